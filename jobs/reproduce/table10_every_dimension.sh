#!/bin/sh
# The study of jobs/studies/table10_every_dimension.toml, from anywhere; run it again to resume.
set -eu
cd "$(dirname "$0")/../.."
exec longrope2 study jobs/studies/table10_every_dimension.toml "$@"
