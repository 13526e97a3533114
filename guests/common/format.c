/* SPDX-License-Identifier: Apache-2.0 OR MIT */
/*
 * The part of printf that the guests need: %% %c %s %d %u %x, the last three
 * also with l or ll, %f and %e, and a width, zero padding and a precision.
 * Portable.
 */
#include "runtime.h"

struct sink {
	char *out;
	size_t size, length;
};

struct spec {
	unsigned width, precision;
	bool zero_padded, left, long_argument;
};

static void put(struct sink *sink, char c)
{
	if (sink->length + 1 < sink->size)
		sink->out[sink->length++] = c;
}

static void put_padded(struct sink *sink, const struct spec *spec, const char *text, size_t length)
{
	size_t padding = length < spec->width ? spec->width - length : 0;

	if (spec->zero_padded && length > 0 && text[0] == '-') {
		put(sink, '-');
		text++;
		length--;
	}
	while (!spec->left && padding > 0) {
		put(sink, spec->zero_padded ? '0' : ' ');
		padding--;
	}
	while (length-- > 0)
		put(sink, *text++);
	while (padding-- > 0 && spec->left)
		put(sink, ' ');
}

/* Writes the digits so that they end before `end`; returns where they begin. */
static char *digits(char *end, uint64_t value, unsigned base)
{
	do {
		*--end = "0123456789abcdef"[value % base];
		value /= base;
	} while (value != 0);
	return end;
}

static void put_integer(struct sink *sink, const struct spec *spec, uint64_t value, unsigned base, bool negative)
{
	char text[24];
	char *end = text + sizeof(text);
	char *start = digits(end, negative ? -value : value, base);

	if (negative)
		*--start = '-';
	put_padded(sink, spec, start, (size_t)(end - start));
}

static uint64_t power_of_ten(unsigned exponent)
{
	uint64_t power = 1;

	while (exponent-- > 0)
		power *= 10;
	return power;
}

/* value < 2^63 / 10^precision: all that the guests print. */
static size_t fixed_text(char *out, long double value, unsigned precision)
{
	char reversed[24];
	char *end = reversed + sizeof(reversed);
	uint64_t scale = power_of_ten(precision);
	uint64_t scaled = (uint64_t)(value * (long double)scale + 0.5L);
	size_t length = 0;
	char *at;

	for (at = digits(end, scaled / scale, 10); at < end; at++)
		out[length++] = *at;
	if (precision == 0)
		return length;
	out[length++] = '.';
	at = digits(end, scaled % scale, 10);
	for (unsigned i = (unsigned)(end - at); i < precision; i++)
		out[length++] = '0';
	while (at < end)
		out[length++] = *at++;
	return length;
}

static size_t exponent_text(char *out, double value, unsigned precision)
{
	long double mantissa = value;
	int exponent = 0;
	size_t length;

	while (mantissa >= 10.0L) {
		mantissa /= 10.0L;
		exponent++;
	}
	while (mantissa != 0 && mantissa < 1.0L) {
		mantissa *= 10.0L;
		exponent--;
	}
	/* Rounding may carry into a second digit before the point. */
	if (mantissa + 0.5L / (long double)power_of_ten(precision) >= 10.0L) {
		mantissa /= 10.0L;
		exponent++;
	}
	length = fixed_text(out, mantissa, precision);
	out[length++] = 'e';
	out[length++] = exponent < 0 ? '-' : '+';
	if (exponent < 0)
		exponent = -exponent;
	if (exponent >= 100)
		out[length++] = (char)('0' + exponent / 100);
	out[length++] = (char)('0' + exponent / 10 % 10);
	out[length++] = (char)('0' + exponent % 10);
	return length;
}

static void put_float(struct sink *sink, const struct spec *spec, double value, char conversion)
{
	char text[64];
	size_t length = 0;

	if (value != value) {
		put_padded(sink, spec, "nan", 3);
		return;
	}
	if (value < 0) {
		text[length++] = '-';
		value = -value;
	}
	if (value > 1.7976931348623157e308) {
		memcpy(text + length, "inf", 3);
		length += 3;
	} else if (conversion == 'e' || value >= 1e12) {
		length += exponent_text(text + length, value, spec->precision);
	} else {
		length += fixed_text(text + length, value, spec->precision);
	}
	put_padded(sink, spec, text, length);
}

static const char *parse_spec(const char *format, struct spec *spec)
{
	*spec = (struct spec){.precision = 6};
	for (; *format == '0' || *format == '-'; format++) {
		if (*format == '0')
			spec->zero_padded = true;
		else
			spec->left = true;
	}
	for (; *format >= '0' && *format <= '9'; format++)
		spec->width = 10 * spec->width + (unsigned)(*format - '0');
	if (*format == '.') {
		spec->precision = 0;
		for (format++; *format >= '0' && *format <= '9'; format++)
			spec->precision = 10 * spec->precision + (unsigned)(*format - '0');
	}
	if (spec->precision > 17)
		spec->precision = 17;
	for (; *format == 'l' || *format == 'z'; format++)
		spec->long_argument = true;
	return format;
}

size_t format_text(char *out, size_t size, const char *format, va_list args)
{
	struct sink sink = {out, size, 0};
	struct spec spec;
	const char *text;
	int64_t number;
	char c;

	for (; *format != '\0'; format++) {
		if (*format != '%') {
			put(&sink, *format);
			continue;
		}
		format = parse_spec(format + 1, &spec);
		switch (*format) {
		case 'd':
			number = spec.long_argument ? va_arg(args, int64_t) : va_arg(args, int);
			put_integer(&sink, &spec, (uint64_t)number, 10, number < 0);
			break;
		case 'u':
		case 'x':
			number = spec.long_argument ? va_arg(args, int64_t) : (int64_t)va_arg(args, unsigned);
			put_integer(&sink, &spec, (uint64_t)number, *format == 'x' ? 16 : 10, false);
			break;
		case 'f':
		case 'e':
			put_float(&sink, &spec, va_arg(args, double), *format);
			break;
		case 's':
			text = va_arg(args, const char *);
			put_padded(&sink, &spec, text, text_length(text));
			break;
		case 'c':
			c = (char)va_arg(args, int);
			put_padded(&sink, &spec, &c, 1);
			break;
		default:
			put(&sink, *format);
			break;
		}
	}
	if (size > 0)
		out[sink.length] = '\0';
	return sink.length;
}

size_t format_line(char *out, size_t size, const char *format, ...)
{
	va_list args;
	size_t length;

	va_start(args, format);
	length = format_text(out, size, format, args);
	va_end(args);
	return length;
}
