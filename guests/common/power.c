/* SPDX-License-Identifier: Apache-2.0 OR MIT */
/* The ways out. */
#include "machine.h"

/* PM1a_CNT: SLP_EN with SLP_TYP 0, which is S5 here as it is in QEMU. */
#define PM1A_CONTROL 0x604
#define PM1_SLEEP_ENABLE 0x2000

/* Cloud Hypervisor's register; elsewhere PM1a_STS, whose bits 2, 4 and 5 this
   clears. */
#define SLEEP_CONTROL 0x600
#define SLEEP_S5 0x34

#define I8042_COMMAND 0x64
#define I8042_RESET 0xfe

void triple_fault(void)
{
	for (;;)
		kernel_call(SERVICE_TRIPLE_FAULT, 0, 0);
}

void reset(void)
{
	out8(I8042_COMMAND, I8042_RESET);
	triple_fault();
}

void power_off(void)
{
	out16(PM1A_CONTROL, PM1_SLEEP_ENABLE);
	out8(SLEEP_CONTROL, SLEEP_S5);
	reset();
}

/* Where traps.S reports an exception, at CPL3 and on a stack of its own. */
_Noreturn void panic(uint64_t vector, uint64_t error, uint64_t rip, uint64_t cr2, uint64_t rsp, uint64_t cs)
{
	/* Not print(): the fault may have come while its lock was held. */
	char line[256];
	size_t length = format_line(line, sizeof(line),
				    "PANIC vector=%lu error=0x%lx rip=0x%lx cr2=0x%lx rsp=0x%lx cs=0x%lx\r\n", vector,
				    error, rip, cr2, rsp, cs);

	serial_write(line, length);
	power_off();
}
