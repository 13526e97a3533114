# A stock Debian kernel boots from the XML in examples/linux to a shell on its serial port, with 1 and
# with 4 vCPUs, and from a bzImage as from the ELF file in it; is told who and what it is; and is
# powered off from inside, by the power button, and resets itself.
for example in shell smp; do
    [ $example = shell ] && cpus=1 || cpus=4
    rm -f console; seen=0
    linux_xml $example.xml > linux.xml
    start=$SECONDS
    start_vm run linux.xml
    wait_for 300 "lab: guest ready, $cpus CPUs"
    echo "$example: $cpus vCPUs, ready after $((SECONDS - start)) s"
    check_log boot
    mark
    say 'echo uuid $(cat /sys/class/dmi/id/product_uuid) vendor $(cat /sys/class/dmi/id/sys_vendor)'
    wait_for 30 '^(lab# )*uuid [0-9a-f-]{36} vendor livepoint'
    uuid=$("$LIVEPOINT" status linux-$example --json | grep -oE '[0-9a-f]{8}-[0-9a-f-]{27}')
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
    if [ $example = shell ]; then
        mark
        say 'reboot -f'
        wait_for 300 "lab: guest ready, $cpus CPUs"
        say 'poweroff -f'
    else
        mark
        "$LIVEPOINT" shutdown linux-smp
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
