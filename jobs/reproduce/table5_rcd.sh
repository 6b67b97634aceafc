#!/bin/sh
# Table 5's comparison: NTK and YaRN with the critical dimension that the search finds (rcd) against
# themselves and against LongRoPE2, on the demo's model.
set -eu
cd "$(dirname "$0")/../.."
exec longrope2 search demo --run-dir runs/table5_rcd \
    --report.methods '["ntk", "ntk-rcd", "yarn", "yarn-rcd", "longrope2"]' "$@"
