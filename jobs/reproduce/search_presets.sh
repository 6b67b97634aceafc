#!/bin/sh
# The study of jobs/studies/search_presets.toml, from anywhere; run it again to resume.
set -eu
cd "$(dirname "$0")/../.."
exec longrope2 study jobs/studies/search_presets.toml "$@"
