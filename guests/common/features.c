/* SPDX-License-Identifier: Apache-2.0 OR MIT */
/* Vector extensions that the CPU and XCR0 offer and `simd=` allows. Portable. */
#include "runtime.h"

const struct cpu_features *cpu_features(void)
{
	static struct cpu_features features;
	static bool known;
	uint32_t leaf1[4], leaf7[4], xcr0, high;

	if (known)
		return &features;
	known = true;
	if (text_equal(arg_text("simd", "auto"), "sse2"))
		return &features;
	cpuid(0, 0, leaf7);
	if (leaf7[0] < 7)
		return &features;
	cpuid(1, 0, leaf1);
	cpuid(7, 0, leaf7);
	if ((leaf1[2] & 1u << 27) == 0) /* OSXSAVE */
		return &features;
	__asm__ volatile("xgetbv" : "=a"(xcr0), "=d"(high) : "c"(0));
	features.avx2_fma = (xcr0 & 0x6) == 0x6 && (leaf1[2] & 1u << 12) != 0 && (leaf7[1] & 1u << 5) != 0;
	features.avx512f = (xcr0 & 0xe6) == 0xe6 && (leaf7[1] & 1u << 16) != 0;
	return &features;
}
