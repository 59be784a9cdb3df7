// Conversations, kept in this browser alone (IndexedDB); settings in localStorage.

const NAME = "mlx-vlm-mini", STORE = "conversations";

function open() {
  return new Promise((resolve, reject) => {
    const request = indexedDB.open(NAME, 1);
    request.onupgradeneeded = () => request.result.createObjectStore(STORE, { keyPath: "id" });
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });
}

async function run(mode, act) {
  const database = await open();
  try {
    return await new Promise((resolve, reject) => {
      const transaction = database.transaction(STORE, mode);
      const request = act(transaction.objectStore(STORE));
      transaction.oncomplete = () => resolve(request.result);
      transaction.onerror = transaction.onabort = () => reject(transaction.error);
    });
  } finally {
    database.close();
  }
}

export const all = async () => (await run("readonly", store => store.getAll())).sort((a, b) => b.updated - a.updated);
export const put = conversation => run("readwrite", store => store.put({ ...conversation, updated: Date.now() }));
export const remove = id => run("readwrite", store => store.delete(id));

export function settings() {
  try {
    return JSON.parse(localStorage.getItem(NAME)) ?? {};
  } catch {
    return {};
  }
}

export const keepSettings = values => localStorage.setItem(NAME, JSON.stringify(values));
