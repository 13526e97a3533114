/* SPDX-License-Identifier: Apache-2.0 OR MIT */
/*
 * A console to talk to: repeats lines, knows a few commands, and powers off
 * when the ACPI power button is pressed. Between inputs the CPU is halted.
 */
#include "runtime.h"

#define COM1_INTERRUPTS (COM1 + 1)
#define LINE_STATUS_HAS_DATA 0x01
#define INTERRUPT_ON_DATA 0x01
#define COM1_IRQ 4

/* PM1a event block: status, then enable. */
#define PM1A_STATUS 0x600
#define PM1A_ENABLE 0x602
#define PM1_POWER_BUTTON 0x100
#define SCI_IRQ 9

#define LINE_MAX 256

#define BACKSPACE 0x08
#define DELETE 0x7f

static char line[LINE_MAX];
static size_t line_length;
static bool skip_newline; /* the last end of line was a carriage return */
static uint64_t count, started;

static void prompt(void)
{
	serial_write("> ", 2);
}

/* The number after a command, or the fallback where there is none. */
static uint64_t operand(const char *text, uint64_t fallback)
{
	uint64_t value = 0;

	if (*text < '0' || *text > '9')
		return fallback;
	for (; *text >= '0' && *text <= '9'; text++)
		value = 10 * value + (uint64_t)(*text - '0');
	return value;
}

static void do_count(const char *text)
{
	for (uint64_t left = operand(text, 1); left > 0; left--)
		print("echo: count %lu\n", ++count);
}

/* Deaf to everything meanwhile, as a guest that hangs is. */
static void do_spin(const char *text)
{
	uint64_t seconds = operand(text, 0), start = rdtsc();

	print("echo: spinning\n");
	while (seconds == 0 || rdtsc() - start < seconds * tsc_khz() * 1000)
		cpu_relax();
	print("echo: spun\n");
}

static void do_uptime(const char *text)
{
	uint64_t now = rdtsc(), khz = tsc_khz();

	(void)text;
	print("echo: uptime tsc=%lu cycles=%lu seconds=%.3f\n", now, now - started,
	      khz == 0 ? 0 : (double)(now - started) / (double)khz / 1000);
}

static void do_poweroff(const char *text)
{
	(void)text;
	print("echo: powering off\n");
	power_off();
}

static void do_reboot(const char *text)
{
	(void)text;
	print("echo: rebooting\n");
	reset();
}

static void do_crash(const char *text)
{
	(void)text;
	print("echo: crashing\n");
	triple_fault();
}

static void do_panic(const char *text)
{
	(void)text;
	__asm__ volatile("hlt"); /* #GP at CPL3 */
}

static void do_help(const char *text);

static const struct command {
	const char *name;
	void (*run)(const char *text);
} commands[] = {
	{"count", do_count}, {"crash", do_crash}, {"help", do_help},     {"panic", do_panic},   {"poweroff", do_poweroff},
	{"reboot", do_reboot}, {"spin", do_spin},   {"uptime", do_uptime},
};

#define COMMANDS (sizeof(commands) / sizeof(commands[0]))

static void do_help(const char *text)
{
	(void)text;
	for (size_t i = 0; i < COMMANDS; i++)
		print("echo: command %s\n", commands[i].name);
}

/* The rest of the line after a command's name, or NULL if it is another. */
static const char *after_name(const char *text, const char *name)
{
	while (*name != '\0' && *text == *name) {
		text++;
		name++;
	}
	if (*name != '\0' || (*text != '\0' && *text != ' '))
		return NULL;
	return *text == ' ' ? text + 1 : text;
}

static void run_line(void)
{
	line[line_length] = '\0';
	line_length = 0;
	for (size_t i = 0; i < COMMANDS; i++) {
		const char *rest = after_name(line, commands[i].name);

		if (rest != NULL) {
			commands[i].run(rest);
			return;
		}
	}
	print("echo: %s\n", line);
}

static void take_character(char c)
{
	bool after_return = skip_newline;

	skip_newline = c == '\r';
	if (c == '\n' && after_return)
		return;
	if (c == '\r' || c == '\n') {
		serial_write("\r\n", 2);
		run_line();
		prompt();
	} else if (c == BACKSPACE || c == DELETE) {
		if (line_length > 0) {
			line_length--;
			serial_write("\b \b", 3);
		}
	} else if (c >= ' ' && line_length < LINE_MAX - 1) {
		line[line_length++] = c;
		serial_write(&c, 1);
	}
}

static void serve_serial(void)
{
	while (in8(COM1_LINE_STATUS) & LINE_STATUS_HAS_DATA)
		take_character((char)in8(COM1));
}

static void serve_acpi(void)
{
	uint16_t status = in16(PM1A_STATUS);

	/* What is written as one is cleared, and the interrupt with it. */
	out16(PM1A_STATUS, status);
	if (status & PM1_POWER_BUTTON) {
		print("\n");
		print("echo: power button\n");
		power_off();
	}
}

static void enable_devices(void)
{
	irq_init();
	irq_enable(COM1_IRQ, false);
	irq_enable(SCI_IRQ, true);
	out16(PM1A_STATUS, PM1_POWER_BUTTON);
	out16(PM1A_ENABLE, PM1_POWER_BUTTON);
	out8(COM1_INTERRUPTS, INTERRUPT_ON_DATA);
}

void guest_main(void)
{
	started = rdtsc();
	enable_devices();
	print("echo: ready tsc=%lu tsc_khz=%lu ram=%lu\n", started, tsc_khz(), ram_bytes());
	prompt();
	/* What came before interrupts were on raised none. */
	serve_serial();
	for (;;) {
		uint32_t irqs = wait_for_irq();

		if (irqs & 1u << COM1_IRQ) {
			serve_serial();
			end_of_irq();
		}
		if (irqs & 1u << SCI_IRQ) {
			serve_acpi();
			end_of_irq();
		}
	}
}
