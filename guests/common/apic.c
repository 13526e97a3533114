/* SPDX-License-Identifier: Apache-2.0 OR MIT */
/* Local APIC, I/O APIC, and waiting for an interrupt. */
#include "machine.h"

#define MSR_APIC_BASE 0x1b
#define APIC_BASE_X2APIC (1u << 10)
#define MSR_X2APIC 0x800 /* plus the xAPIC offset / 16 */

#define LAPIC_ID 0x20
#define LAPIC_EOI 0xb0

#define IOAPIC_SELECT 0x00
#define IOAPIC_WINDOW 0x10
#define IOAPIC_REDIRECTION(irq) (0x10 + 2 * (irq))
#define REDIRECTION_LEVEL (1u << 15)

#define PIC1_MASK 0x21
#define PIC2_MASK 0xa1

bool lapic_is_x2apic(void)
{
	static int mode = -1;

	if (mode < 0)
		mode = (read_msr(MSR_APIC_BASE) & APIC_BASE_X2APIC) != 0;
	return mode;
}

uint32_t lapic_read(uint32_t offset)
{
	if (lapic_is_x2apic())
		return (uint32_t)read_msr(MSR_X2APIC + offset / 16);
	return *(volatile uint32_t *)(LAPIC_BASE + offset);
}

void lapic_write(uint32_t offset, uint32_t value)
{
	if (lapic_is_x2apic())
		write_msr(MSR_X2APIC + offset / 16, value);
	else
		*(volatile uint32_t *)(LAPIC_BASE + offset) = value;
}

static void ioapic_write(uint32_t index, uint32_t value)
{
	*(volatile uint32_t *)(IOAPIC_BASE + IOAPIC_SELECT) = index;
	*(volatile uint32_t *)(IOAPIC_BASE + IOAPIC_WINDOW) = value;
}

void irq_init(void)
{
	/* The 8259s' vectors are those of exceptions until somebody sets them. */
	out8(PIC1_MASK, 0xff);
	out8(PIC2_MASK, 0xff);
	lapic_write(LAPIC_SPURIOUS, LAPIC_ENABLED | (IRQ_VECTOR + IRQ_COUNT - 1));
}

void irq_enable(unsigned irq, bool level_triggered)
{
	uint32_t id = lapic_read(LAPIC_ID);

	if (lapic_is_x2apic())
		id <<= 24;
	ioapic_write(IOAPIC_REDIRECTION(irq) + 1, id);
	ioapic_write(IOAPIC_REDIRECTION(irq), (IRQ_VECTOR + irq) | (level_triggered ? REDIRECTION_LEVEL : 0));
}

uint32_t wait_for_irq(void)
{
	while (irqs_pending == 0)
		kernel_call(SERVICE_WAIT, 0, 0);
	return __atomic_exchange_n(&irqs_pending, 0, __ATOMIC_RELAXED);
}

void end_of_irq(void)
{
	lapic_write(LAPIC_EOI, 0);
}
