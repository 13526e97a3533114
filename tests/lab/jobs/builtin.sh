# Livepoint's own guests under ordinary KVM and an older kernel (6.1): every protocol takes a live
# checkpoint, the machine is killed, and the restored one goes on where the checkpoint was.
cat > echo.xml <<XML
<domain type='kvm'>
  <name>lab-echo</name>
  <memory unit='MiB'>64</memory>
  <os><type arch='x86_64'>hvm</type><kernel>builtin:echo</kernel></os>
  <devices><serial type='stdio'><target port='0'/></serial><memballoon model='none'/></devices>
</domain>
XML
start_vm run echo.xml
wait_for 60 'echo: ready'
say count 3
wait_for 20 'echo: count 3'
count=3
for protocol in $protocols; do
    rm -f image.lpi
    checkpoint lab-echo --protocol "$protocol" --out image.lpi --json > figures.json
    echo "echo $protocol: $(grep -oE '"(protocol|fallback|downtime_us|total_us)": *[^,]*' figures.json | tr '\n' ' ')"
    kill_vm
    "$LIVEPOINT" verify image.lpi > /dev/null || fail "verify"
    mark
    start_vm restore image.lpi
    say count
    wait_for 30 "echo: count $((++count))\$"
done
mark
"$LIVEPOINT" shutdown lab-echo
wait_for 20 'power button'
wait_vm

sed -e 's/lab-echo/lab-npb/; s/builtin:echo/builtin:npb/' \
    -e "s|<memory.*|<memory unit='MiB'>192</memory>|" \
    -e 's|</kernel>|</kernel><cmdline>kernel=mg class=S repeat=40</cmdline>|' echo.xml > npb.xml
for protocol in $protocols; do
    rm -f image.lpi console
    seen=0
    start_vm run npb.xml
    wait_for 60 'iteration 2/'
    checkpoint lab-npb --protocol "$protocol" --out image.lpi --json > figures.json
    echo "npb $protocol: $(grep -oE '"(protocol|fallback|downtime_us|total_us)": *[^,]*' figures.json | tr '\n' ' ')"
    kill_vm
    mark
    start_vm restore image.lpi
    wait_for 120 'npb: done'
    lines 'npb: done.*failed=0' > /dev/null || fail "a result is wrong"
    wait_vm
done
echo "all right"
