#!/usr/bin/env bash
# Replaces every server of the compose project by one of the image's present version, one after the other: the new one
# beside the old, and the old one told to end when the new one is ready. No request fails. If a new one does not get ready
# it goes away again, and the others stay as they are.
#   docker compose -f docker/compose.yaml build && docker/rolling-update.sh
# COMPOSE_FILE and COMPOSE_PROJECT_NAME say which project, as for docker compose itself.
set -euo pipefail
export COMPOSE_FILE=${COMPOSE_FILE:-$(dirname "$0")/compose.yaml}
# HAProxy sees a new server after its name server's answer (1 s) and a check (1 s).
seen_after_s=3

old=$(docker compose ps --quiet server)
servers=$(wc -w <<<"$old")
for container in $old; do
    before=$(docker compose ps --quiet server)
    if ! docker compose up --detach --no-build --no-deps --no-recreate --wait --scale "server=$((servers + 1))" server; then
        docker compose ps --all --quiet server | grep --invert-match --fixed-strings "$before" | xargs docker rm --force --volumes
        echo "rolling-update: a new server did not get ready; the $servers that were there still are" >&2
        exit 1
    fi
    sleep "$seen_after_s"
    docker stop --time 75 "$container" >/dev/null
    docker rm --volumes "$container" >/dev/null
done
