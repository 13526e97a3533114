/* SPDX-License-Identifier: Apache-2.0 OR MIT */
/*
 * Elementary functions, there being no libm. Each reduces its argument to a
 * small one and sums a series that converges fast there, to the last term that
 * a double can show.
 */
#ifndef ELEMENTARY_H
#define ELEMENTARY_H

#include "npb.h"

#define LN_2 0.693147180559945309417

#define FRACTION_BITS 52
#define FRACTION_MASK ((1ul << FRACTION_BITS) - 1)

static inline double double_of_bits(uint64_t bits)
{
	union {
		uint64_t bits;
		double value;
	} both = {.bits = bits};

	return both.value;
}

static inline uint64_t bits_of_double(double value)
{
	union {
		double value;
		uint64_t bits;
	} both = {.value = value};

	return both.bits;
}

/*
 * The natural logarithm of a positive normal number, to about 2 ulp.
 *
 * The number is m 2^e with m between the roots of 1/2 and 2, and ln m is
 * 2 artanh s = 2 (s + s^3/3 + s^5/5 + ...) with s = (m - 1) / (m + 1), which is
 * below 0.172. Numbers near 1 have e = 0, so that nothing cancels.
 *
 * No branch and no conversion of integers: a loop over it becomes vector code.
 */
static inline __attribute__((always_inline)) double natural_logarithm(double value)
{
	const uint64_t root_of_half = 0x3fe6a09e667f3bcd;
	const uint64_t offset = 1024; /* keeps e from being negative */
	uint64_t bits = bits_of_double(value) + ((offset << FRACTION_BITS) - root_of_half);
	double m = double_of_bits((bits & FRACTION_MASK) + root_of_half);
	/* An integer below 2^52 is the fraction of 2^52 and itself. */
	double e = double_of_bits(bits >> FRACTION_BITS | bits_of_double(0x1p52)) - (0x1p52 + (double)offset);
	double s = (m - 1) / (m + 1), z = s * s;
	double series = 1.0 / 21;

	series = 1.0 / 19 + z * series;
	series = 1.0 / 17 + z * series;
	series = 1.0 / 15 + z * series;
	series = 1.0 / 13 + z * series;
	series = 1.0 / 11 + z * series;
	series = 1.0 / 9 + z * series;
	series = 1.0 / 7 + z * series;
	series = 1.0 / 5 + z * series;
	series = 1.0 / 3 + z * series;
	return e * LN_2 + (2 * s + 2 * s * z * series);
}

#endif
