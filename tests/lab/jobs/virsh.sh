# A stock Debian kernel under stock virsh, from end to end: defined, started, logged in to at its
# console, changed in memory and on its disk between two live snapshots, reverted to each, and shut
# down. The daemon is ended and started again in between. What the guest's process may do is what
# docs/libvirt.md says, on a kernel that is older than the one of the host.
daemon=$(dirname "$LIVEPOINT")/livepointd
uri="livepoint:///system?socket=/mnt/tmp/virsh.sock"
daemon_pid=

start_daemon() {
    "$daemon" --config-dir "$work/etc" --state-dir "$work/var" --runtime-dir "$LIVEPOINT_RUNTIME_DIR" \
        --socket /mnt/tmp/virsh.sock 2>> errors &
    daemon_pid=$!
    local deadline=$((SECONDS + 120))
    until virsh -c "$uri" version > version 2>&1; do
        [ $SECONDS -lt $deadline ] || fail "no daemon: $(cat version)"
        kill -0 $daemon_pid || fail "the daemon ended"
        nap 0.5
    done
}

# virsh outlives a guest that crashed.
alive() {
    local log
    mapfile -t log < "$work/var/log/debian.log"
    kill -0 "$vm" 2> /dev/null && [[ ${log[*]} != *'the guest crashed'* ]]
}

v() { timeout 300 virsh -c "$uri" "$@" 2> refusal || { cat refusal >> errors; return 1; }; }

# Attaches a console: `say` types, and the file console has what is shown.
attach() {
    [ -z "$vm" ] || kill_vm
    touch console
    mark
    rm -f input
    mkfifo input
    # virsh wants a terminal.
    script -qfc "virsh -c '$uri' console debian --force" /dev/null < input >> console 2>> errors &
    vm=$!
    exec 7> input
    wait_for 120 'Escape character'
}

# What is typed before virsh listens is lost: types until the shell answers.
wake() {
    local try
    for try in {1..30}; do
        say ''
        nap 2
        ! lines '^lab# ' > /dev/null || return 0
    done
    fail "no shell at the console"
}

# answer_prompt PROMPT TEXT: a prompt throws away what was typed before it listens, which is a little after it
# is there to be seen. The next prompt to answer must be a new one.
answer_prompt() {
    wait_for 60 "$1"
    nap 1
    mark
    say "$2"
}

# Takes a live snapshot; again where this emulated machine was kept waiting (see `checkpoint`).
snapshot() {
    local try
    for try in 1 2 3 4 5 6 7 8 9 10; do
        ! v snapshot-create-as debian "$@" --live || return 0
        grep -qE 'the guest was (resumed: nothing moved|let go: it waited)|is in use by process' refusal || break
        echo "again: $(cat refusal)" >&2
        nap 3
    done
    fail "snapshot $*: $(cat refusal)"
}

# Has the guest show where it is: in memory, and on its disk.
expect_state() {
    mark
    say 'echo state $(cat /tmp/state) $(cat /mnt/state) of $(id -un)'
    wait_for 120 "state $1 $1 of root"
}

change_state() {
    mark
    say "echo $1 > /tmp/state; echo $1 > /mnt/state; sync; echo changed \$?"
    wait_for 120 'changed 0'
}

truncate -s 64M disk.img
mkfs.ext4 -q -F disk.img
linux_xml disk.xml > example.xml
sed -e "s|<source file='.*'/>|<source file='$work/disk.img'/>|" \
    -e 's|<name>.*</name>|<name>debian</name>|' -e 's|break=top|lab.login|' \
    -e "s|<serial type='stdio'>|<serial type='pty'>|" \
    -e "s|<os>|<metadata><l:checkpoint xmlns:l='urn:livepoint:1' codec='none' pause_limit_ms='30000'/></metadata><os>|" \
    example.xml > debian.xml
start_daemon
echo "$(v version)"
v define debian.xml || fail define
v start debian || fail start
attach
wait_for 400 'lab login:'
answer_prompt 'lab login:' root
answer_prompt 'Password:' wrong
wait_for 60 'Login incorrect'
answer_prompt 'lab login:' root
answer_prompt 'Password:' lab
wait_for 60 'lab# '
mark
say 'mount -t ext4 /dev/vda /mnt; echo logged in as $(id -un) on $(tty)'
wait_for 60 'logged in as root on /dev/ttyS0'

pid=$(v qemu-monitor-command debian '{"execute":"livepoint-status"}' | grep -oE '"pid":[0-9]+' | grep -oE '[0-9]+')
grep -E '^(Seccomp|NoNewPrivs|CapEff):' "/proc/$pid/status"
grep -q '^Seccomp:.*2' "/proc/$pid/status" || fail "no seccomp filter"
! grep -E 'WARN|ERROR' "$work/var/log/debian.log" || fail "the process complained"

change_state one
snapshot first
expect_state one
change_state two
snapshot second --memspec "file=$work/second.lpi,snapshot=external"
echo "$(v domjobinfo debian --completed --rawstats --anystats | grep -E 'livepoint.(protocol|downtime_us)' | tr '\n' ' ')"
change_state three
expect_state three
v snapshot-list debian --tree

# Another daemon finds it all.
kill -TERM $daemon_pid
wait $daemon_pid || fail "the daemon ended with $?"
start_daemon
[ "$(v domstate debian)" = running ] || fail "the guest did not outlive the daemon"
attach
wake
expect_state three

for name in first second first; do
    v snapshot-revert debian $name || fail "revert to $name: $(cat refusal)"
    attach
    wake
    case $name in first) expect_state one ;; *) expect_state two ;; esac
    # It works on from there.
    change_state "after-$name"
    expect_state "after-$name"
done

v suspend debian
[ "$(v domstate debian --reason)" = "paused (user)" ] || fail "suspend"
v resume debian
mark
say 'umount /mnt && dmesg -c | grep -E "BUG:|soft lockup|hard LOCKUP|rcu.*stall|EXT4-fs error" | sed "s/^/log: /"; echo log checked'
wait_for 120 '^log checked'
! lines '^log: ' || fail "the guest's kernel complained"
v shutdown debian || fail shutdown
deadline=$((SECONDS + 120))
until [ "$(v domstate debian)" = "shut off" ]; do
    [ $SECONDS -lt $deadline ] || fail "it did not shut down"
    nap 1
done
[ "$(v domstate debian --reason)" = "shut off (shutdown)" ] || fail "$(v domstate debian --reason)"
kill_vm
e2fsck -fn disk.img > fsck.log 2>&1 || { cat fsck.log; fail "the file system is not clean"; }
v snapshot-delete debian first --children || fail "delete: $(cat refusal)"
v undefine debian || fail "undefine: $(cat refusal)"
[ -z "$(v list --all --name)" ] || fail "it is still listed"
kill -TERM $daemon_pid
wait $daemon_pid || true
echo "all right"
