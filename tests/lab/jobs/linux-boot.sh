# A stock Debian kernel boots from the XML in examples/linux to a shell on its serial port, with 1 and
# with 4 vCPUs, and from a bzImage as from the ELF file in it; is told who and what it is; finds its
# virtio disk and network device by the distribution's own modules, and exchanges packets with the
# host; and is powered off from inside, by the power button, and resets itself.
truncate -s 32M disk.img
head -c 4M /dev/urandom > data
sum=$(sha256sum < data | cut -d ' ' -f 1)

# Bytes go to the guest and back by TCP: checksums and large packets are left to the host's kernel.
exchange_packets() {
    local from
    "$LIVEPOINT" dumpxml linux-net | grep -q "dev='lp-net0'" || fail "the XML does not name the tap"
    ip address add 192.0.2.1/24 dev lp-net0
    mark
    say 'echo net $(cat /sys/class/net/eth0/address) $(readlink /sys/class/net/eth0/device/driver | sed s,.*/,,)'
    wait_for 60 'net 52:54:00:12:34:56 virtio_net'
    say 'ip link set eth0 up; ip address add 192.0.2.2/24 dev eth0; ping -c 3 192.0.2.1; echo link $(cat /sys/class/net/eth0/carrier)'
    wait_for 60 '3 packets transmitted, 3 packets received, 0% packet loss'
    wait_for 60 'link 1'
    say 'nc -l -p 5000 > /tmp/data; sha256sum /tmp/data; nc -l -p 5001 < /tmp/data'
    send_data || fail "no connection to the guest"
    wait_for 120 "$sum  /tmp/data"
    from=$(timeout 120 bash -c 'for n in {1..100}; do exec 5<> /dev/tcp/192.0.2.2/5001 && break; sleep 0.2; done; cat <&5' 2> /dev/null | sha256sum | cut -d ' ' -f 1)
    [ "$from" = "$sum" ] || fail "the guest sent other bytes than it was sent"
    "$LIVEPOINT" status linux-net --json > status.json
    grep -q '"sent_errors": *0' status.json || fail "packets were refused: $(cat status.json)"
    say 'cat /proc/net/dev | sed s/^/dev:/'
}

send_data() {
    timeout 120 bash -c 'for n in {1..100}; do exec 5> /dev/tcp/192.0.2.2/5000 && break; sleep 0.2; done; cat data >&5' 2> /dev/null
}

for cpus in 1 4; do
    rm -f console; seen=0
    linux_xml net.xml | sed -e "s|<source file='.*'/>|<source file='$work/disk.img'/>|" -e "s|<vcpu>1|<vcpu>$cpus|" > linux.xml
    start=$SECONDS
    start_vm run linux.xml
    wait_for 300 "lab: guest ready, $cpus CPUs"
    echo "$cpus vCPUs, ready after $((SECONDS - start)) s"
    check_log boot
    mark
    say 'echo uuid $(cat /sys/class/dmi/id/product_uuid) vendor $(cat /sys/class/dmi/id/sys_vendor)'
    wait_for 30 '^(lab# )*uuid [0-9a-f-]{36} vendor livepoint'
    uuid=$("$LIVEPOINT" status linux-net --json | grep -oE '[0-9a-f]{8}-[0-9a-f-]{27}')
    lines "uuid $uuid" > /dev/null || fail "the guest has another UUID than $uuid"
    mark
    say 'echo rtc $(hwclock -u -r | wc -l) $(cat /sys/class/rtc/rtc0/since_epoch) date $(date +%s)'
    wait_for 60 'rtc 1 [0-9]+ date [0-9]+'
    now=$(date +%s)
    for shown in $(lines 'rtc 1' | grep -oE '[0-9]{9,}'); do
        [ $((now - shown)) -le 5 ] && [ $((now - shown)) -ge -1 ] || fail "a clock shows $shown at $now"
    done
    mark
    say 'echo devices: $(ls /sys/bus/acpi/devices); echo source $(cat /sys/devices/system/clocksource/clocksource0/current_clocksource)'
    wait_for 30 'source (kvm-clock|tsc)'
    lines 'devices:.*PNP0A03' > /dev/null || fail "no PCI root bridge"
    mark
    say 'echo +2 > /sys/class/rtc/rtc0/wakealarm; sleep 5; grep rtc0 /proc/interrupts | sed s/^/alarm:/'
    wait_for 60 'alarm: *8:.*[1-9].*rtc0'
    say 'echo disk $(cat /sys/block/vda/size) $(cat /sys/block/vda/serial) $(readlink /sys/block/vda/device/driver | sed s,.*/,,)'
    wait_for 60 'disk 65536 lab-disk virtio_blk'
    mark
    say 'modprobe virtio_rng; echo random $(cat /sys/class/misc/hw_random/rng_current) $(head -c 16 /dev/hwrng | wc -c)'
    wait_for 60 'random virtio_rng.0 16'
    exchange_packets
    if [ $cpus = 1 ]; then
        mark
        say 'reboot -f'
        wait_for 300 "lab: guest ready, $cpus CPUs"
        say 'poweroff -f'
    else
        mark
        "$LIVEPOINT" shutdown linux-net
        wait_for 60 'lab: power button'
    fi
    wait_vm 60 || fail "the process ended with status $?"
done
rm -f console; seen=0
linux_xml smp.xml "$LAB_DIR/vmlinux" > linux.xml
start_vm run linux.xml
wait_for 300 "lab: guest ready, 4 CPUs"
say 'poweroff -f'
wait_vm 60 || fail "the process ended with status $?"
echo "all right"
