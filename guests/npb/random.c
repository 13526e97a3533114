/* SPDX-License-Identifier: Apache-2.0 OR MIT */
/* The benchmarks' linear congruential generator. */
#include "npb.h"

double randlc(uint64_t *x, uint64_t a)
{
	/* The product wraps at 2^64, which leaves its low 46 bits right. */
	*x = *x * a & NPB_MODULUS_MASK;
	return (double)*x * 0x1p-46;
}
