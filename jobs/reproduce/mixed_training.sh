#!/bin/sh
# The study of jobs/studies/mixed_training.toml, from anywhere; run it again to resume.
set -eu
cd "$(dirname "$0")/../.."
exec longrope2 study jobs/studies/mixed_training.toml "$@"
