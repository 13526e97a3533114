/* SPDX-License-Identifier: Apache-2.0 OR MIT */
/* Interrupt gates, and what the CPU can do. */
#include "machine.h"

#define GATE_INTERRUPT 0x8e00ull /* present, DPL 0: only the CPU may use it */

static void set_gate(unsigned vector, const char *handler)
{
	uint64_t address = (uint64_t)handler;

	idt[vector][0] = (address & 0xffff) | (uint64_t)SEL_KERNEL_CODE << 16 | GATE_INTERRUPT << 32 |
			 (address >> 16 & 0xffff) << 48;
	idt[vector][1] = address >> 32;
}

void cpu_init(void)
{
	for (unsigned vector = 0; vector < 32; vector++)
		set_gate(vector, exception_stubs + 32 * vector);
	for (unsigned irq = 0; irq < IRQ_COUNT; irq++)
		set_gate(IRQ_VECTOR + irq, irq_stubs + 16 * irq);
}
