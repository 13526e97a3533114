/* SPDX-License-Identifier: Apache-2.0 OR MIT */
/*
 * Output on COM1. Every byte costs an exit to the VMM, ten microseconds and
 * more: guests print little, and only whole lines.
 */
#include "machine.h"

#define COM1_INTERRUPTS (COM1 + 1)
#define COM1_FIFO (COM1 + 2)
#define COM1_LINE_CONTROL (COM1 + 3)
#define COM1_MODEM_CONTROL (COM1 + 4)

static struct lock serial_lock;

void serial_init(void)
{
	out8(COM1_INTERRUPTS, 0);
	out8(COM1_LINE_CONTROL, 3);    /* 8 bits, no parity */
	out8(COM1_FIFO, 7);            /* on, and empty */
	out8(COM1_MODEM_CONTROL, 0xb); /* DTR, RTS, interrupts */
}

void serial_write(const char *text, size_t bytes)
{
	kernel_call(SERVICE_WRITE_COM1, (uint64_t)text, bytes);
}

void lock_acquire(struct lock *lock)
{
	while (__atomic_exchange_n(&lock->held, 1, __ATOMIC_ACQUIRE) != 0)
		cpu_relax();
}

void lock_release(struct lock *lock)
{
	__atomic_store_n(&lock->held, 0, __ATOMIC_RELEASE);
}

static void print_line(const char *format, va_list args)
{
	char line[512];
	size_t length = format_text(line, sizeof(line) - 1, format, args);

	/* A terminal in raw mode needs the carriage return. */
	if (length > 0 && line[length - 1] == '\n') {
		line[length - 1] = '\r';
		line[length++] = '\n';
	}
	lock_acquire(&serial_lock);
	serial_write(line, length);
	lock_release(&serial_lock);
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
	serial_write("\r\n", 2);
	power_off();
}
