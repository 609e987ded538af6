#!/bin/sh
# Handwritten digits in one and two steps: a flow, trained and straightened once. About 20 minutes on two CPU cores.
#
#   sh recipes/straight_digits.sh [FOLDER]
#
# What it reached is in recipes/README.md; FOLDER/compare/report.html shows it, FOLDER/diagnosis how straight it is.
set -e
out=${1:-runs/straight-digits}
fluvial train digits --out "$out/base" --steps 1500
fluvial straighten "$out/base" --out "$out/straight" -n 20000 --steps 1500
fluvial evaluate "$out/base" "$out/straight" --steps 1,2,4,8,64 -n 1000 --out "$out/compare"
