#!/bin/sh
# Makes the bundled model, from nothing, into the folder given (1 GB; an hour on two free cores). Run again, it goes on
# where it was stopped. Needs scikit-learn for the digits.
#
# What was learned on the way (each a run of its own; docs and CHANGELOG have no more of it):
# - Patches of 8 of a picture of 64 pixels, not of 16 of 96: 25,000 pictures then teach shapes and digits what 33,000 do
#   not (48 and 70 % right against 36 and 39, a tower alone, asked directly).
# - Muon for the matrices: 275 steps reach the loss that AdamW reaches in 500.
# - Things that fill the picture first, and nothing but their shape asked: 3,000 pictures teach it (93 % of such ones), and
#   13,000 more, with ever smaller things further from the centre, carry it to small things anywhere (87 %). Without, 170,000
#   pictures of small things leave triangles and stars a matter of chance, told from circles and squares by their area.
#   Asked for colours, too, at this stage, the tower learns colours and no shapes.
# - At a rate of 1e-3 shapes come and go; at 5e-4 they stay.
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

# stage NAME MODEL DATA STEPS RATE [OPTION...]
stage() {
    name=$1 model=$2 data=$3 steps=$4 rate=$5
    shift 5
    [ -d "$work/run-$name/model" ] || mlx-vlm-mini train "$model" --data "$data" --valid "$work/valid/scenes.jsonl" \
        --output "$work/run-$name" --stage full --optimizer muon --batch-size 32 --steps "$steps" \
        --learning-rate "$rate" --warmup 40 --weight-decay 0.01 --checkpoint-every 50 "$@"
}

scenes words --count 4000 --seed 1 --digits 0.1
scenes valid --count 300 --seed 4 --digits 0.08
[ -d "$work/tokenizer" ] || python "$here/tokenizer.py" "$work/words/scenes.jsonl" "$work/tokenizer"
[ -d "$work/fresh" ] || mlx-vlm-mini compose "$work/fresh" --vision "$here/vision" --decoder "$here/decoder" \
    --tokenizer "$work/tokenizer" --feature-layer -1

scenes near --count 4800 --seed 51 --most 1 --pairs 0 --digits 0.2 --close 0.8 --radii 0.35 0.45 --words 0
scenes wider --count 4800 --seed 52 --most 1 --pairs 0 --digits 0.2 --close 0.8 --radii 0.2 0.45 --words 0
scenes both --count 8000 --seed 53 --most 1 --pairs 0 --digits 0.15 --close 0.45 --radii 0.2 0.4 --words 0
scenes alone --count 12800 --seed 18 --most 1 --pairs 0 --digits 0.3 --words 0
[ -f "$work/shapes.jsonl" ] || python "$here/curriculum.py" "$work" "$work/shapes.jsonl"
stage shapes "$work/fresh" "$work/shapes.jsonl" 900 5e-4 --in-order

scenes talk --count 40000 --seed 31 --pairs 0.15 --digits 0.1 --close 0.05 --words 60
