# A stock kernel gives memory back: what it does not use, by itself, so that an image does not have it;
# and as much as it is asked for. It takes it again, also after a restore. It says how it uses its
# memory, and goes on saying so.
linux_xml net.xml | sed -e '/^    <disk/,/<\/disk>/d' -e '/^    <interface/,/<\/interface>/d' \
    -e "s|<memballoon model='none'/>|<memballoon model='virtio' freePageReporting='on'><stats period='1'/></memballoon>|" > linux.xml
start_vm run linux.xml
wait_for 300 'lab: guest ready, 1 CPUs'
check_log boot

# Prints how many KiB of the guest's memory the host has, by the machine's largest mapping.
resident() { awk '/^Rss:/ && $2 > most { most = $2 } END { print most }' "/proc/$vm/smaps"; }

# Waits until that is less, or more, than so much.
wait_resident() {
    local deadline=$((SECONDS + 90))
    until [ "$(resident)" "$1" "$2" ]; do
        [ $SECONDS -lt $deadline ] || fail "$(resident) KiB of memory are there, wanted: $1 $2"
        nap 0.5
    done
}

# Waits until the guest says that of its memory so many bytes, or more, are used one way.
figure() { "$LIVEPOINT" status linux-net --json | grep -oE "\"$1\": *[0-9]+" | grep -oE '[0-9]+$'; }
wait_figure() {
    local deadline=$((SECONDS + 90))
    until [ "$(figure "$1" || echo 0)" "$2" "$3" ]; do
        [ $SECONDS -lt $deadline ] || fail "$1 is $(figure "$1"), wanted: $2 $3"
        nap 0.5
    done
}

wait_figure total_bytes -gt $((400 << 20))
[ "$(figure total_bytes)" -lt $((512 << 20)) ] || fail "the guest has $(figure total_bytes) bytes"
was_free=$(figure free_bytes)
fill='dd if=/dev/urandom of=/tmp/fill bs=1M count=150 2> /dev/null; sha256sum /tmp/fill | cut -c 1-8 | sed s/^/filled:/'
say "$fill"
wait_for 120 '^(lab# )*filled:'
wait_figure free_bytes -lt $((was_free - 100000000))
full=$(resident)
[ "$full" -ge 150000 ] || fail "only $full KiB are there"
checkpoint linux-net --protocol stop --out full.lpi --json > figures.json
say 'rm /tmp/fill; sync; echo 3 > /proc/sys/vm/drop_caches; echo is free'
wait_for 60 'is free'
wait_resident -lt $((full - 120000))
checkpoint linux-net --protocol threaded --out free.lpi --json > figures.json
say_figures threaded
with=$(stat -c %s full.lpi) without=$(stat -c %s free.lpi)
echo "$full KiB, then $(resident) KiB; images of $with and $without bytes"
[ $((with - without)) -ge 100000000 ] || fail "free memory is in the image"
mark
say "$fill"
wait_for 120 '^(lab# )*filled:'
say 'rm /tmp/fill; echo is free'
wait_for 60 'is free'

# Half of its memory, by the balloon.
cat > ask.py <<'PY'
import json, socket, sys
client = socket.socket(socket.AF_UNIX)
client.connect(sys.argv[1])
lines = client.makefile("rw")
lines.readline()
lines.write(json.dumps({"id": 1, "method": "set-memory", "params": {"bytes": int(sys.argv[2])}}) + "\n")
lines.flush()
print(lines.readline())
PY
given() { "$LIVEPOINT" status linux-net --json | grep -oE '"given_bytes": *[0-9]+' | grep -oE '[0-9]+'; }
ask() {
    local deadline=$((SECONDS + 90))
    python3 ask.py "$(find "$LIVEPOINT_RUNTIME_DIR" -name 'linux-net*.sock*' | head -n 1)" "$1" | grep -q result || fail "set-memory"
    until [ "$(given)" = "$2" ]; do
        [ $SECONDS -lt $deadline ] || fail "$(given) bytes were given, $2 were asked for"
        nap 0.5
    done
}
ask $((256 << 20)) $((256 << 20))
for protocol in threaded cow; do
    rm -f image.lpi
    checkpoint linux-net --protocol $protocol --out image.lpi --json > figures.json
    kill_vm
    start_vm restore image.lpi
    mark
    say 'echo total $(grep MemTotal /proc/meminfo | grep -oE "[0-9]+")'
    wait_for 60 'total [0-9]+'
    [ "$(given)" = $((256 << 20)) ] || fail "the balloon is forgotten"
    total=$(lines 'total [0-9]+' | grep -oE '[0-9]+')
    [ "$total" -lt 262144 ] || fail "the guest has $total KiB"
    wait_figure total_bytes -eq $((total << 10))
done
ask $((512 << 20)) 0
mark
say "$fill"
wait_for 120 '^(lab# )*filled:'
check_log boot
say 'poweroff -f'
wait_vm 60 || fail "the process ended with status $?"
echo "all right"
