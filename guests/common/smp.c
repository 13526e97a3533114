/* SPDX-License-Identifier: Apache-2.0 OR MIT */
/* Starts the other CPUs, one after the other. */
#include "machine.h"

#define LAPIC_ICR_LOW 0x300
#define LAPIC_ICR_HIGH 0x310
#define MSR_X2APIC_ICR 0x830
#define ICR_PENDING (1u << 12)
#define ICR_INIT 0x4500
#define ICR_STARTUP 0x4600

#define TSS_PRESENT_AVAILABLE 0x89ull

/* Of a TSC whose rate is not known: as if it were fast. */
#define TSC_KHZ_ASSUMED 4000000ull
#define START_TIMEOUT_MS 5000
/* The specified wait between INIT and SIPI, in ms. */
#define INIT_WAIT_MS 10

static void (*run_on)(unsigned cpu);
static unsigned starting;
static volatile unsigned started;

/* Where entry.S takes an AP, at CPL3 and on its own stack. */
static _Noreturn void ap_start(void)
{
	unsigned cpu = starting;

	/* From here on the BSP may reuse the start_* variables. */
	__atomic_store_n(&started, cpu, __ATOMIC_RELEASE);
	run_on(cpu);
	for (;;)
		kernel_call(SERVICE_WAIT, 0, 0);
}

static uint64_t ms_to_cycles(uint64_t ms)
{
	uint64_t khz = tsc_khz();

	return ms * (khz != 0 ? khz : TSC_KHZ_ASSUMED);
}

static void send_ipi(unsigned apic_id, uint32_t command)
{
	if (lapic_is_x2apic()) {
		write_msr(MSR_X2APIC_ICR, (uint64_t)apic_id << 32 | command);
		return;
	}
	lapic_write(LAPIC_ICR_HIGH, apic_id << 24);
	lapic_write(LAPIC_ICR_LOW, command);
	for (unsigned polls = 0; polls < 1000; polls++) {
		if ((lapic_read(LAPIC_ICR_LOW) & ICR_PENDING) == 0)
			return;
	}
}

static bool wait_started(unsigned cpu, uint64_t ms)
{
	uint64_t until = rdtsc() + ms_to_cycles(ms);

	while (__atomic_load_n(&started, __ATOMIC_ACQUIRE) != cpu) {
		if (rdtsc() > until)
			return false;
		cpu_relax();
	}
	return true;
}

static void prepare_start(unsigned cpu)
{
	char *tss = arena_alloc(TSS_BYTES, 4096);
	char *kernel_stack = arena_alloc(KERNEL_STACK_BYTES, 4096);
	char *user_stack = arena_alloc(USER_STACK_BYTES, 4096);
	uint64_t base = (uint64_t)tss;
	uint64_t *descriptor = &gdt[SEL_TSS0 / 8 + 2 * cpu];
	uint16_t io_bitmap = TSS_IO_BITMAP;

	start_kernel_stack = (uint64_t)kernel_stack + KERNEL_STACK_BYTES;
	start_user_stack = (uint64_t)user_stack + USER_STACK_BYTES - 8; /* as after a call */
	start_rip = (uint64_t)ap_start;
	start_tss_selector = SEL_TSS0 + 16 * cpu;

	memcpy(tss + 4, &start_kernel_stack, 8);
	memcpy(tss + 102, &io_bitmap, 2);
	tss[TSS_LIMIT] = (char)0xff;
	descriptor[0] = TSS_LIMIT | (base & 0xffffff) << 16 | TSS_PRESENT_AVAILABLE << 40 | (base >> 24 & 0xff) << 56;
	descriptor[1] = base >> 32;
	starting = cpu;
}

void smp_start(unsigned count, void (*run)(unsigned cpu))
{
	if (count > MAX_CPUS)
		fail("runtime: vcpus=%u is more than %u", count, MAX_CPUS);
	if (count <= 1)
		return;
	run_on = run;
	memcpy((void *)TRAMPOLINE_GPA, trampoline, (size_t)(trampoline_end - trampoline));
	lapic_write(LAPIC_SPURIOUS, LAPIC_ENABLED | 0xff);
	for (unsigned cpu = 1; cpu < count; cpu++) {
		prepare_start(cpu);
		send_ipi(cpu, ICR_INIT);
		wait_started(cpu, INIT_WAIT_MS);
		send_ipi(cpu, ICR_STARTUP | TRAMPOLINE_GPA / 4096);
		if (wait_started(cpu, INIT_WAIT_MS))
			continue;
		/* The second one is for hardware that misses the first; a CPU
		   that has started does not mind it. */
		send_ipi(cpu, ICR_STARTUP | TRAMPOLINE_GPA / 4096);
		if (!wait_started(cpu, START_TIMEOUT_MS))
			fail("runtime: CPU %u does not start", cpu);
	}
}
