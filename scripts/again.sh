#!/usr/bin/env bash
# Runs a command that fetches things up to three times in all, as a mirror may be gone for a moment: again.sh COMMAND...
# Exits as its last run did. AGAIN_PAUSES_S: the seconds between tries, "5 20" unless given.
set -uo pipefail
trap 'exit 130' INT  # pip ends by itself then, and bash would go on
for pause_s in ${AGAIN_PAUSES_S-5 20}; do
    "$@" && exit
    echo "this failed and is tried again in $pause_s s: $*" >&2
    sleep "$pause_s"
done
exec "$@"
