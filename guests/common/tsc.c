/* SPDX-License-Identifier: Apache-2.0 OR MIT */
/* The TSC's rate, from whoever knows it. */
#include "machine.h"

#define MSR_KVM_SYSTEM_TIME 0x4b564d01
#define KVM_FEATURE_CLOCKSOURCE2 (1u << 3)

/* What KVM writes at the address given to MSR_KVM_SYSTEM_TIME. */
struct pvclock {
	uint32_t version, pad;
	uint64_t tsc_timestamp, system_time_ns;
	uint32_t tsc_to_ns_multiplier;
	int8_t tsc_shift;
	uint8_t flags, pad2[2];
};

static uint64_t khz_from_intel_leaves(void)
{
	uint32_t regs[4];

	cpuid(0, 0, regs);
	if (regs[0] < 0x15)
		return 0;
	cpuid(0x15, 0, regs);
	if (regs[0] != 0 && regs[1] != 0 && regs[2] != 0)
		return (uint64_t)regs[2] * regs[1] / regs[0] / 1000;
	return 0;
}

/* kvmclock scales the TSC to ns, so it knows the rate. Asked for once: left
   on, the host would write to this page every now and then. */
static uint64_t khz_from_kvmclock(uint32_t base)
{
	static struct pvclock clock __attribute__((aligned(64)));
	volatile struct pvclock *seen = &clock;
	uint32_t regs[4];
	uint64_t khz;

	cpuid(base + 1, 0, regs);
	if ((regs[0] & KVM_FEATURE_CLOCKSOURCE2) == 0)
		return 0;
	write_msr(MSR_KVM_SYSTEM_TIME, (uint64_t)&clock | 1);
	khz = 0;
	if (seen->tsc_to_ns_multiplier != 0) {
		khz = (1000000ull << 32) / seen->tsc_to_ns_multiplier;
		khz = seen->tsc_shift < 0 ? khz << -seen->tsc_shift : khz >> seen->tsc_shift;
	}
	write_msr(MSR_KVM_SYSTEM_TIME, 0);
	return khz;
}

static uint64_t khz_from_hypervisor(void)
{
	uint32_t base = 0x40000000;
	uint32_t regs[4];

	cpuid(1, 0, regs);
	if ((regs[2] & 1u << 31) == 0)
		return 0;
	cpuid(base, 0, regs);
	if (regs[0] >= base + 0x10) {
		cpuid(base + 0x10, 0, regs);
		if (regs[0] != 0)
			return regs[0];
		cpuid(base, 0, regs);
	}
	if (regs[1] == 0x4b4d564b && regs[2] == 0x564b4d56 && regs[3] == 0x4d) /* KVMKVMKVM */
		return khz_from_kvmclock(base);
	return 0;
}

uint64_t tsc_khz(void)
{
	static uint64_t khz;
	static bool known;

	if (known)
		return khz;
	known = true;
	khz = arg_number("tsc_khz", 0);
	if (khz == 0)
		khz = khz_from_intel_leaves();
	if (khz == 0)
		khz = khz_from_hypervisor();
	return khz;
}
