# A stock kernel appends synced records to ext4 on its virtio disk, computes, and exchanges packets with
# the host, while live checkpoints are taken at random moments, by one protocol after the other. Each time
# the machine is killed and restored, stopped: on a copy of its disk the journal is replayed, the file
# system is clean, and every record is there that the guest had reported at the captured moment, and none
# that it wrote after. It then runs on: records, checksums and packets. LAB_CHECKPOINTS says how many.
count=${LAB_CHECKPOINTS:-5}
truncate -s 64M disk.img
mkfs.ext4 -q -F disk.img
# A tap that outlives the machine, as its user's own.
ip tuntap add dev lp-net0 mode tap
ip address add 192.0.2.1/24 dev lp-net0
ip link set lp-net0 up
trap 'end_vm; ip link delete lp-net0 || true; rm -rf "$work"' EXIT
linux_xml net.xml | sed -e "s|<source file='.*'/>|<source file='$work/disk.img'/>|" -e "s|dev='lp-net0'|& managed='no'|" \
    -e "s|<memory unit='MiB'>512|<memory unit='MiB'>256|" > linux.xml

# Prints the last record that the guest has reported, or with `first` the first behind the mark.
reported() {
    if [ "${1:-}" = first ]; then
        lines '^(lab# )*journal: [0-9]+$' | head -n 1 | grep -oE '[0-9]+$'
    else
        (seen=0; lines '^(lab# )*journal: [0-9]+$' | tail -n 1 | grep -oE '[0-9]+$')
    fi
}

# Replays the journal of a copy of the disk, checks it, and sets `whole` to its last record.
check_copy() {
    cp --sparse=always disk.img copy.img
    e2fsck -fy copy.img > fsck.log 2>&1 || [ $? = 1 ] || { cat fsck.log; fail "replay"; }
    e2fsck -fn copy.img > fsck.log 2>&1 || { cat fsck.log; fail "the file system is not clean"; }
    rm -f log
    debugfs -R "dump /log log" copy.img 2> /dev/null
    whole=$("$LAB_DIR/journal" check log | grep -oE 'whole [0-9]+' | grep -oE '[0-9]+') || fail "$("$LAB_DIR/journal" check log)"
}

start_vm run linux.xml
wait_for 300 'lab: guest ready, 1 CPUs'
check_log boot
say 'ip link set eth0 up; ip address add 192.0.2.2/24 dev eth0; mount -t ext4 /dev/vda /mnt'
say 'sums & journal write /mnt/log & ping 192.0.2.1 | sed s/^.*seq=/seq:/ &'
wait_for 120 'sums: round 1 all right'
wait_for 120 'journal: 20$'
wait_for 120 'seq:2 '
for ((n = 0; n < count; n++)); do
    protocol=$(echo $protocols | cut -d ' ' -f $((n % 4 + 1)))
    nap $((RANDOM % 3)).$((RANDOM % 10))
    rm -f image.lpi
    before=$(reported)
    checkpoint linux-net --protocol "$protocol" --out image.lpi --json > figures.json
    nap 0.$((RANDOM % 10))
    kill_vm
    after=$(reported)
    # The line that was being printed ends here: its rest may be printed again.
    echo >> console
    mark
    start_vm restore image.lpi --paused
    until "$LIVEPOINT" status linux-net > /dev/null 2>&1; do
        kill -0 "$vm" 2> /dev/null || fail "the restore ended"
        nap 0.2
    done
    check_copy
    "$LIVEPOINT" resume linux-net
    wait_for 120 '^(lab# )*journal: [0-9]+$'
    next=$(reported first)
    say_figures "$n $protocol: reported $before before, $after at the crash; on the disk $whole; then $next"
    [ "$whole" -ge "$before" ] && [ "$whole" -le $((after + 1)) ] || fail "the disk is of another moment"
    [ "$whole" -eq $((next - 1)) ] || [ "$whole" -eq "$next" ] || fail "memory and disk are of two moments"
    wait_for 120 'sums: round [0-9]+ all right'
    wait_for 120 '^(lab# )*seq:[0-9]+ '
    ! grep -aE 'WRONG|FAILED' console || fail "the guest found something wrong"
done
mark
say 'killall sums journal ping; sleep 1; umount /mnt && echo is unmounted'
wait_for 60 'is unmounted'
last=$(reported)
check_log boot
say 'poweroff -f'
wait_vm 60 || fail "the process ended with status $?"
e2fsck -fn disk.img > fsck.log 2>&1 || { cat fsck.log; fail "the file system is not clean"; }
check_copy
[ "$whole" -ge "$last" ] && [ "$whole" -le $((last + 1)) ] || fail "$last were reported, $whole are on the disk"
echo "all right"
