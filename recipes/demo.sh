#!/bin/sh
# Makes the bundled model, from nothing, into the folder given (some GB; hours on two cores). Run again, it goes on where
# it was stopped. Needs scikit-learn for the digits.
set -eu
work=${1:?usage: recipes/demo.sh FOLDER}
here=$(dirname "$0")/demo
mkdir -p "$work"

# A set of scenes is written once; a half-written one is begun again.
scenes() {
    name=$1
    shift
    if [ ! -d "$work/$name" ]; then
        rm -rf "$work/$name.part"
        mlx-vlm-mini scenes "$work/$name.part" "$@"
        mv "$work/$name.part" "$work/$name"
    fi
}

scenes words --count 4000 --seed 1 --digits 0.1
scenes easy --count 60000 --seed 2 --most 2 --pairs 0 --digits 0.08
scenes all --count 160000 --seed 3 --digits 0.08
scenes valid --count 300 --seed 4 --digits 0.08
scenes test --count 1000 --seed 2026 --digits 0.1 --test

[ -d "$work/tokenizer" ] || python "$here/tokenizer.py" "$work/words/scenes.jsonl" "$work/tokenizer"
[ -d "$work/fresh" ] || mlx-vlm-mini compose "$work/fresh" --vision "$here/vision" --decoder "$here/decoder" \
    --tokenizer "$work/tokenizer" --feature-layer -1
