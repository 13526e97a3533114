/* SPDX-License-Identifier: Apache-2.0 OR MIT */
/* Options from the kernel command line. Portable. */
#include "runtime.h"

#define MAX_ARGS 64

static char words[2048];
static const char *keys[MAX_ARGS], *values[MAX_ARGS];
static unsigned count;

bool text_equal(const char *a, const char *b)
{
	while (*a != '\0' && *a == *b) {
		a++;
		b++;
	}
	return *a == *b;
}

size_t text_length(const char *text)
{
	size_t length = 0;

	while (text[length] != '\0')
		length++;
	return length;
}

/* Words without a `=` are for somebody else, as are keys nobody asks for:
   VMMs add their own to the command line. */
void args_parse(const char *cmdline)
{
	char *at = words;
	size_t length = text_length(cmdline);

	if (length >= sizeof(words))
		length = sizeof(words) - 1;
	memcpy(words, cmdline, length);
	words[length] = '\0';
	count = 0;
	while (*at != '\0' && count < MAX_ARGS) {
		char *word = at, *value = NULL;

		for (; *at != '\0' && *at != ' '; at++) {
			if (*at == '=' && value == NULL) {
				*at = '\0';
				value = at + 1;
			}
		}
		if (*at == ' ')
			*at++ = '\0';
		if (value == NULL)
			continue;
		keys[count] = word;
		values[count++] = value;
	}
}

const char *arg_text(const char *key, const char *fallback)
{
	/* The last one wins, so that a default can be overridden by appending. */
	for (unsigned i = count; i-- > 0;) {
		if (text_equal(keys[i], key))
			return values[i];
	}
	return fallback;
}

uint64_t arg_number(const char *key, uint64_t fallback)
{
	const char *text = arg_text(key, NULL);
	const char *at = text;
	uint64_t value = 0;

	if (text == NULL)
		return fallback;
	for (; *at >= '0' && *at <= '9'; at++)
		value = 10 * value + (uint64_t)(*at - '0');
	if (at == text)
		fail("runtime: %s=%s is not a number", key, text);
	switch (*at) {
	case 'K':
	case 'k':
		value *= KIB;
		at++;
		break;
	case 'M':
	case 'm':
		value *= MIB;
		at++;
		break;
	case 'G':
	case 'g':
		value *= GIB;
		at++;
		break;
	case 'T':
	case 't':
		value *= 1024 * GIB;
		at++;
		break;
	default:
		break;
	}
	if (*at != '\0')
		fail("runtime: %s=%s is not a number", key, text);
	return value;
}
