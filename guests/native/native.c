/* SPDX-License-Identifier: Apache-2.0 OR MIT */
/*
 * Runs a guest's guest_main() as an ordinary Linux process, options as
 * arguments: shows that the computation is right without a hypervisor.
 */
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#include "runtime.h"

static void print_line(const char *format, va_list args)
{
	char line[512];
	size_t length = format_text(line, sizeof(line), format, args);

	if (write(STDOUT_FILENO, line, length) != (ssize_t)length)
		exit(EXIT_FAILURE);
}

void print(const char *format, ...)
{
	va_list args;

	va_start(args, format);
	print_line(format, args);
	va_end(args);
}

void fail(const char *format, ...)
{
	va_list args;

	va_start(args, format);
	print_line(format, args);
	va_end(args);
	print("\n");
	exit(EXIT_FAILURE);
}

void *arena_alloc(uint64_t bytes, uint64_t align)
{
	char *memory = mmap(NULL, bytes + align, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	if (memory == MAP_FAILED)
		fail("native: no room for %lu bytes", bytes);
	memory = (char *)(((uint64_t)memory + align - 1) & -align);
	/* As a guest has it that maps 2 MiB pages. */
	madvise(memory, bytes, MADV_HUGEPAGE);
	return memory;
}

static uint64_t now_ns(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return (uint64_t)now.tv_sec * 1000000000 + (uint64_t)now.tv_nsec;
}

/* Counted over 20 ms. */
uint64_t tsc_khz(void)
{
	static uint64_t khz;
	uint64_t start_ns = now_ns(), start = rdtsc();

	if (khz != 0)
		return khz;
	usleep(20000);
	khz = (rdtsc() - start) * 1000000 / (now_ns() - start_ns);
	return khz;
}

int main(int argc, char **argv)
{
	static char cmdline[2048];
	size_t length = 0;

	for (int i = 1; i < argc && length < sizeof(cmdline); i++)
		length += (size_t)snprintf(cmdline + length, sizeof(cmdline) - length, "%s ", argv[i]);
	args_parse(cmdline);
	guest_main();
	return EXIT_SUCCESS;
}
