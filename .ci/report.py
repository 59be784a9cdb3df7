"""What a fresh install brings: versions, their age, size, licence and what asks for them; as Markdown.

Known holes: `pip-audit` asks https://pypi.org and https://osv.dev. Where it is installed and reaches them its findings
stand below the table; where not, that is said.
"""

import json
import subprocess
import sys
import urllib.request
from datetime import UTC, datetime
from importlib.metadata import Distribution, distributions, metadata
from re import match

OWN = "mlx-vlm-mini"


def required(name: str) -> set[str]:
    """Names that a distribution asks for here, extras left out."""
    found = set()
    for line in Distribution.from_name(name).requires or []:
        named = match(r"[A-Za-z0-9._-]+", line)
        if named and "extra ==" not in line:
            found.add(named[0].lower().replace("_", "-"))
    return found


def published(name: str, version: str) -> str:
    """The day, where the registry says it."""
    try:
        with urllib.request.urlopen(f"https://pypi.org/pypi/{name}/{version}/json", timeout=10) as answer:
            return str(json.load(answer)["urls"][0]["upload_time_iso_8601"])[:10]
    except (OSError, ValueError, KeyError, IndexError):
        return "unknown"


def main() -> None:
    here = {each.metadata["Name"].lower().replace("_", "-"): each for each in distributions()}
    asked: dict[str, set[str]] = {OWN: set()}
    waiting = [OWN]
    while waiting:
        name = waiting.pop()
        for each in required(name) if name in here else ():
            if each in here:
                waiting += [each] if each not in asked else []
                asked.setdefault(each, set()).add(name)
    print(f"{len(asked) - 1} packages, Python {sys.version.split()[0]}, {datetime.now(UTC):%Y-%m-%d}\n")
    print("| package | version | published | MB | licence | asked for by |\n| --- | --- | --- | ---: | --- | --- |")
    for name in sorted(set(asked) - {OWN}):
        found, about = here[name], metadata(name)
        size = sum(file.size or 0 for file in found.files or []) / 1e6
        named = [line.rpartition(":: ")[2] for line in about.get_all("Classifier") or [] if line.startswith("License")]
        licence = about.get("License-Expression") or (
            named[0] if named else (about.get("License") or "?").splitlines()[0]
        )
        print(
            f"| {name} | {found.version} | {published(name, found.version)} | {size:.1f} | {licence[:40]} | "
            f"{', '.join(sorted(asked[name]))} |"
        )
    audit = subprocess.run(
        [sys.executable, "-m", "pip_audit", "--progress-spinner", "off"], capture_output=True, text=True
    )
    last = (audit.stderr or audit.stdout).strip().splitlines()[-1:] or ["no answer"]
    print(
        f"\npip-audit: {audit.stdout.strip() or last[0]}" if audit.returncode in (0, 1) else f"\npip-audit: {last[0]}"
    )


main()
