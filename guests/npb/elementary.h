/* SPDX-License-Identifier: Apache-2.0 OR MIT */
/*
 * Elementary functions, there being no libm. Each reduces its argument to a
 * small one and sums a series that converges fast there, to the last term that
 * a double can show.
 */
#ifndef ELEMENTARY_H
#define ELEMENTARY_H

#include "npb.h"

#define PI 3.14159265358979323846
#define LN_2 0.693147180559945309417
/* LN_2 in two parts, of which the first has 32 bits: multiples of it are exact
   up to 2^21. */
#define LN_2_HIGH 0x1.62e42feep-1
#define LN_2_LOW 0x1.a39ef35793c76p-33

#define FRACTION_BITS 52
#define FRACTION_MASK ((1ul << FRACTION_BITS) - 1)
#define EXPONENT_BIAS 1023ul

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

/*
 * e^value for values from -700 to 700, to about 1 ulp: 2^n times the series of
 * what is left of the value without n ln 2, at most 0.35.
 */
static inline double exponential(double value)
{
	int n = (int)(value / LN_2 + (value < 0 ? -0.5 : 0.5));
	double rest = value - n * LN_2_HIGH - n * LN_2_LOW;
	double series = 1;

	for (int i = 13; i > 0; i--)
		series = 1 + series * rest / i;
	return series * double_of_bits((EXPONENT_BIAS + (uint64_t)n) << FRACTION_BITS);
}

/*
 * Cosine and sine of `part` of `whole` equal parts of a turn, to about 2 ulp.
 * `whole` is a multiple of 8. The angle is taken from the nearest multiple of a
 * quarter turn, exactly, so that it is at most an eighth turn.
 */
static inline void cosine_and_sine(uint64_t part, uint64_t whole, double *cosine, double *sine)
{
	uint64_t octant = part * 8 / whole;
	uint64_t rest = part - octant * whole / 8;
	double angle, square, near = 1, far = 1, swap;

	if (octant % 2 == 1)
		rest = whole / 8 - rest;
	angle = 2 * PI * (double)rest / (double)whole;
	square = angle * angle;
	for (int i = 18; i > 0; i -= 2) {
		near = 1 - near * square / (i * (i - 1));
		far = 1 - far * square / (i * (i + 1));
	}
	far *= angle;
	if ((octant + 1) / 2 % 2 == 1) {
		swap = near;
		near = far;
		far = swap;
	}
	*cosine = octant >= 2 && octant < 6 ? -near : near;
	*sine = octant >= 4 ? -far : far;
}

#endif
