# Two machines are restored from one image of a stock kernel and run at the same time, each with a new
# identity and a disk of its own: they have different UUIDs, generation ids, random numbers and hardware
# addresses, reach the host through taps of their own, compute on, and write to disks that the other does
# not see. The clock of one is moved on to now, as asked; that of the other goes on from the captured
# moment. Nobody's kernel complains of hangs or clocks.
truncate -s 64M disk.img
mkfs.ext4 -q -F disk.img
linux_xml net.xml | sed -e "s|<source file='.*'/>|<source file='$work/disk.img'/>|" -e "s|<vcpu>1|<vcpu>2|" \
    -e "s|<memory unit='MiB'>512|<memory unit='MiB'>256|" > linux.xml

# Prints the guest's answer to a command, whose words may be as in the pattern.
answer() {
    mark
    say "echo answer \$($1)"
    wait_for 60 "answer $2"
    lines "answer $2" | sed 's/.*answer //' | tail -n 1
}

# Sets `least` and `most` to the seconds that the guest's date may be ahead of the host's: whole seconds
# are read of both, the host's before and after. How long that takes must decide nothing.
ahead() {
    local try before shown after
    least=-1000000000 most=1000000000
    for try in 1 2 3 4 5; do
        before=$(date +%s)
        shown=$(answer 'date +%s' '[0-9]{9,}')
        after=$(date +%s)
        [ $((shown - after - 1)) -lt $least ] || least=$((shown - after - 1))
        [ $((shown - before + 1)) -gt $most ] || most=$((shown - before + 1))
    done
}

start_vm run linux.xml
wait_for 300 'lab: guest ready, 2 CPUs'
check_log boot
say 'mount -t ext4 /dev/vda /mnt && echo before > /mnt/before && sync && echo is mounted; sums &'
wait_for 60 '^(lab# )*is mounted'
wait_for 120 'sums: round 1 all right'
old_mac=$(answer 'cat /sys/class/net/eth0/address' '[0-9a-f:]{17}')
old_id=$(answer 'dd if=/dev/mem bs=16 skip=61184 count=1 2> /dev/null | od -An -tx1 | tr -d " "' '[0-9a-f]{32}')
ahead
was_least=$least was_most=$most
saved=$(date +%s)
# The moment of this one is soon after its start.
checkpoint linux-net --protocol cow --out image.lpi --json > figures.json
say_figures cow
kill_vm
before=$(sha256sum < disk.img)
nap 20

declare -A vms seens fds
# The functions of tests/lab/functions are for one machine: this is which.
current=
use() {
    if [ -n "$current" ]; then vms[$current]=$vm seens[$current]=$seen; fi
    current=$1
    cd "$work/$1"
    vm=${vms[$1]:-} seen=${seens[$1]:-0}
    [ -z "${fds[$1]:-}" ] || exec 7>&"${fds[$1]}"
}
end_clones() {
    for name in "${!vms[@]}"; do kill -KILL "${vms[$name]}" 2> /dev/null || true; done
    end_vm
    cd /
    rm -rf "$work"
}
trap end_clones EXIT

for name in one two; do
    mkdir -p "$work/$name/disks"
    use "$name"
    clock=
    [ "$name" = two ] || clock='--clock realtime'
    # shellcheck disable=SC2086
    start_vm restore ../image.lpi --new-identity --name "$name" --disks disks $clock
    exec {fd}>&7
    fds[$name]=$fd vms[$name]=$vm
done
for name in one two; do
    use "$name"
    until "$LIVEPOINT" status "$name" > /dev/null 2>&1; do
        kill -0 "$vm" 2> /dev/null || fail "the restore ended"
        nap 0.2
    done
done

declare -A numbers ids macs uuids
for name in one two; do
    use "$name"
    # The first that it draws.
    numbers[$name]=$(answer 'head -c 16 /dev/urandom | od -An -tx1 | tr -d " "' '[0-9a-f]{32}')
    ids[$name]=$(answer 'dd if=/dev/mem bs=16 skip=61184 count=1 2> /dev/null | od -An -tx1 | tr -d " "' '[0-9a-f]{32}')
    uuids[$name]=$("$LIVEPOINT" status "$name" --json | grep -oE '[0-9a-f]{8}-[0-9a-f-]{27}' | head -n 1)
    # The driver reads the address once, when it finds the device.
    macs[$name]=$(answer 'cd /sys/bus/virtio/drivers/virtio_net; for d in virtio*; do echo $d > unbind; echo $d > bind; done; cat /sys/class/net/eth0/address' '[0-9a-f:]{17}')
    "$LIVEPOINT" dumpxml "$name" | grep -q "<mac address='${macs[$name]}'/>" || fail "the XML of $name has not ${macs[$name]}"
    answer 'dmesg | grep -c "crng reseeded due to virtual machine fork"' '[1-9]' > /dev/null
    echo "$name: ${uuids[$name]}, generation ${ids[$name]}, random ${numbers[$name]}, ${macs[$name]}"
done
differ() { [ "$2" != "$3" ] && [ "$2" != "$4" ] && [ "$3" != "$4" ] || fail "$1: $2, $3 and $4"; }
differ "random numbers" "${numbers[one]}" "${numbers[two]}" none
differ "generation ids" "${ids[one]}" "${ids[two]}" "$old_id"
differ "addresses" "${macs[one]}" "${macs[two]}" "$old_mac"
differ "UUIDs" "${uuids[one]}" "${uuids[two]}" "$("$LIVEPOINT" inspect ../image.lpi --manifest | grep -oE '[0-9a-f]{8}-[0-9a-f-]{27}' | head -n 1)"

# One's clock is the host's, as far as it was before; the other's is behind by what was missed.
use one
ahead
late="$((least - was_most)) to $((most - was_least))"
[ $((least - was_most)) -le 1 ] && [ $((most - was_least)) -ge -1 ] || fail "with realtime the guest's clock is off by $late s"
use two
ahead
gone=$(($(date +%s) - saved))
echo "one: off by $late s; two: $((was_least - most)) to $((was_most - least)) s behind, of $gone s since the checkpoint began"
[ $((was_most - least)) -ge 20 ] && [ $((was_least - most)) -le $((gone + 1)) ] || fail "the guest's clock did not stand still"

net=1
for name in one two; do
    use "$name"
    tap=$("$LIVEPOINT" dumpxml "$name" | sed -n "s/.*<target dev='\(vnet[0-9]*\)'.*/\1/p")
    [ -n "$tap" ] || fail "the XML of $name names no tap"
    ip address add "198.51.$net.1/24" dev "$tap"
    ip link set "$tap" up
    mark
    say "ip link set eth0 up; ip address add 198.51.$net.2/24 dev eth0; ping -c 3 198.51.$net.1; echo $name > /mnt/who; sync; echo is written"
    wait_for 60 '3 packets transmitted, 3 packets received, 0% packet loss'
    wait_for 60 '^(lab# )*is written'
    net=$((net + 1))
done
for name in one two; do
    use "$name"
    mark
    wait_for 120 'sums: round [0-9]+ all right'
    wait_for 120 'sums: round [0-9]+ all right'
    ! grep -aE 'WRONG' console || fail "the guest found something wrong"
    check_log
done
for name in one two; do
    use "$name"
    say 'killall sums; sleep 1; umount /mnt && poweroff -f'
    wait_vm 90 || fail "the process ended with status $?"
    unset "vms[$name]"
    current=
    e2fsck -fn disks/*.raw > fsck.log 2>&1 || { cat fsck.log; fail "the file system is not clean"; }
    [ "$(debugfs -R 'cat /who' disks/*.raw 2> /dev/null)" = "$name" ] || fail "$name has another's disk"
    [ "$(debugfs -R 'cat /before' disks/*.raw 2> /dev/null)" = before ] || fail "$name has not the image's disk"
done
[ "$(sha256sum < "$work/disk.img")" = "$before" ] || fail "the old disk was changed"
echo "all right"
