#!/bin/sh
# The study of jobs/studies/table6_plain_perplexity.toml, from anywhere; run it again to resume.
set -eu
cd "$(dirname "$0")/../.."
exec longrope2 study jobs/studies/table6_plain_perplexity.toml "$@"
