#!/usr/bin/env bash
# Two replicas of the built-in model behind nginx, under load; one is killed and comes back. What it was streaming is
# lost and nothing else: check.sh PATH/TO/reroute. Needs nginx and curl; ports 8000 to 8002 must be free.
set -euo pipefail
reroute=$(realpath "${1:?the reroute program}")
here=$(realpath "$(dirname "$0")")
clients=${CLIENTS:-12} requests=${REQUESTS:-25}
scratch=$(mktemp -d)
declare -A replica
nginx_pid=
stop() {
  kill "${replica[@]}" $nginx_pid 2>/dev/null || true
  wait 2>/dev/null || true
  rm -rf "$scratch"
}
trap stop EXIT

start() {
  "$reroute" serve --port "$1" >"$scratch/$1.log" 2>&1 &
  replica[$1]=$!
}
healthy() {
  for _ in $(seq 600); do
    curl -sf "http://127.0.0.1:$1/health" >/dev/null && return
    sleep 0.1
  done
  echo "nobody at port $1"
  exit 1
}

start 8001
start 8002
# The same, and a header that says who answered.
sed 's|proxy_buffering off;|&\n            add_header X-Replica $upstream_addr always;|' "$here/nginx.conf" >"$scratch/nginx.conf"
nginx -p "$scratch" -c nginx.conf -e stderr -g 'daemon off;' 2>"$scratch/nginx.log" &
nginx_pid=$!
healthy 8001
healthy 8002
healthy 8000

# Long streams, whole answers to short questions, and streams that begin anew all the time.
ask() {
  local stream=$1 tokens=$2 name=$3
  curl -sN --max-time 120 -D "$name.head" -o "$name.body" http://127.0.0.1:8000/v1/chat/completions \
    -H 'Content-Type: application/json' -d '{"messages": [{"role": "user", "content": "x"}], "temperature": 50,
      "stream": '"$stream"', "max_tokens": '"$tokens"'}' || true
  local end='\[DONE\]'
  [ "$stream" = true ] || end='"usage"'
  local by
  by=$(tr -d '\r' <"$name.head" | sed -n 's/^X-Replica: //Ip' | tail -1)
  if grep -q "$end" "$name.body" 2>/dev/null && ! grep -q '"error"' "$name.body"; then
    echo "whole $stream $by"
  else
    echo "lost $stream $by $(head -1 "$name.head" 2>/dev/null | tr -d '\r')"
  fi
  rm -f "$name.head" "$name.body"
}
client() {
  for request in $(seq "$requests"); do
    case $(((request + $1) % 3)) in
      0) ask true 400 "$scratch/$1" ;;
      1) ask false 20 "$scratch/$1" ;;
      2) ask true 8 "$scratch/$1" ;;
    esac
  done >"$scratch/told.$1"
}

began=$(date +%s.%N)
pids=()
for each in $(seq "$clients"); do
  client "$each" &
  pids+=($!)
done
told() { cat "$scratch"/told.* 2>/dev/null | wc -l; }
all=$((clients * requests))
until [ "$(told)" -ge $((all / 3)) ]; do sleep 0.05; done
running=$(curl -s http://127.0.0.1:8002/metrics | sed -n 's/^reroute_requests_under_way //p')
kill -9 "${replica[8002]}"
echo "killed the replica at 8002 after $(told) of $all answers; it had $running requests under way"
until [ "$(told)" -ge $((all * 2 / 3)) ]; do sleep 0.05; done
back=$(told)
start 8002
wait "${pids[@]}"
passed=$(echo "$(date +%s.%N) - $began" | bc 2>/dev/null || echo '?')

cat "$scratch"/told.* >"$scratch/told"
count() { grep -c "$1" "$scratch/told" || true; }
lost=$(count '^lost')
echo "it came back after $back; $(count '^whole') of $all answers are whole, $lost lost, in $passed s"
echo "at 8001 $(count '^whole [a-z]* [0-9.]*:8001$'), at 8002 $(count '^whole [a-z]* [0-9.]*:8002$'), asked for again $(count ', ')"
grep '^lost' "$scratch/told" | sort | uniq -c || true
# Only streams that the killed one had begun, and no more than it had under way.
if grep '^lost' "$scratch/told" | grep -qv '^lost true 127.0.0.1:8002 HTTP/1.1 200'; then
  echo 'something else was lost'
  exit 1
fi
[ "$lost" -le $((running + 1)) ] || { echo 'more was lost than it had'; exit 1; }
[ "$(count '^')" = "$all" ] || { echo 'answers are missing'; exit 1; }
echo 'only what it was streaming is lost'
