/* SPDX-License-Identifier: Apache-2.0 OR MIT */
/*
 * From any of three starts to C code at CPL3:
 *
 *   linux64_entry  the 64-bit Linux boot protocol (ELF e_entry): long mode,
 *                  memory identity mapped, RSI = boot_params
 *   pvh_entry      PVH (ELF note): 32-bit protected mode, EBX = hvm_start_info
 *   trampoline     an AP after SIPI: real mode
 *
 * Some hypervisors emulate every CPL0 instruction, a thousand times slower
 * than CPL3 runs. So this file does the least that needs CPL0, builds nothing
 * in loops, and leaves all else to C at CPL3.
 */
#include "layout.h"

	.section .note.boot, "a", @note
	.balign 4
	.long 4, 8, 18 /* XEN_ELFNOTE_PHYS32_ENTRY */
	.asciz "Xen"
	.quad pvh_entry

/* ------------------------------------------------------------------------ */
	.text
	.code64
	.globl linux64_entry
linux64_entry:
	cli
	cld
	movq %rsi, boot_params_gpa
	jmp long_mode

/* ------------------------------------------------------------------------ */
	.code32
	.globl pvh_entry
pvh_entry:
	cli
	cld
	movl %ebx, pvh_start_info_gpa
	jmp enter_long_mode

ap_protected_mode:
	movw $SEL_KERNEL_DATA, %ax
	movw %ax, %ds
	movw %ax, %ss

enter_long_mode:
	movl $0x20, %eax /* PAE */
	movl %eax, %cr4
	movl start_cr3, %eax
	movl %eax, %cr3
	movl $MSR_EFER, %ecx
	rdmsr
	orl $0x100, %eax /* LME */
	wrmsr
	movl %cr0, %eax
	orl $0x80000001, %eax /* PG, PE */
	movl %eax, %cr0
	lgdt gdt_pointer
	ljmp $SEL_KERNEL_CODE, $long_mode

/* ------------------------------------------------------------------------ */
/*
 * Everything that differs between CPUs comes from the start_* variables: they
 * hold the BSP's values at first, and the BSP rewrites them for each AP, which
 * it starts one at a time.
 */
	.code64
long_mode:
	movq start_cr3, %rax
	movq %rax, %cr3
	lgdt gdt_pointer
	lidt idt_pointer
	movl $SEL_USER_DATA, %eax
	movl %eax, %ds
	movl %eax, %es
	movl %eax, %fs
	movl %eax, %gs
	movq start_kernel_stack, %rsp

	/* The linker cannot split an address over a descriptor: do it here. */
	cmpl $SEL_TSS0, start_tss_selector
	jne 1f
	movl $tss0, %eax
	movw %ax, gdt + SEL_TSS0 + 2
	shrl $16, %eax
	movb %al, gdt + SEL_TSS0 + 4
	movb %ah, gdt + SEL_TSS0 + 7
	movq %rsp, tss0 + 4
	movw $TSS_IO_BITMAP, tss0 + 102
	movb $0xff, tss0 + TSS_LIMIT
1:
	movl start_tss_selector, %eax
	ltr %ax

	/* SSE always; XSAVE, and with it AVX and AVX-512, where offered. */
	movl $0x80010033, %eax /* PG WP NE ET MP PE */
	movq %rax, %cr0
	movl $1, %eax
	cpuid
	movl $0x620, %eax /* OSXMMEXCPT OSFXSR PAE */
	movl %ecx, %esi
	andl $(1 << 26), %esi /* XSAVE */
	jz 2f
	orl $0x40000, %eax /* OSXSAVE */
2:
	movq %rax, %cr4
	testl %esi, %esi
	jz 4f
	movl $0xd, %eax
	xorl %ecx, %ecx
	cpuid
	andl $0xe7, %eax
	movl %eax, %edx
	andl $0xe0, %edx
	cmpl $0xe0, %edx /* the three AVX-512 bits only come together */
	je 3f
	andl $0x7, %eax
3:
	xorl %ecx, %ecx
	xorl %edx, %edx
	xsetbv
4:
	pushq $SEL_USER_DATA
	pushq start_user_stack
	pushq $2 /* RFLAGS: interrupts off for good at CPL3 */
	pushq $SEL_USER_CODE
	pushq start_rip
	xorl %ebp, %ebp
	iretq

/* ------------------------------------------------------------------------ */
/* Copied to TRAMPOLINE_GPA: nothing here may refer to itself by address. */
	.code16
	.globl trampoline, trampoline_end
trampoline:
	cli
	lgdtl %cs:(trampoline_gdt - trampoline)
	movl %cr0, %eax
	orl $1, %eax
	movl %eax, %cr0
	ljmpl $SEL_KERNEL_CODE32, $ap_protected_mode
trampoline_gdt:
	.word GDT_ENTRIES * 8 - 1
	.long gdt
trampoline_end:

/* ------------------------------------------------------------------------ */
	.data
	.balign 8
	.globl start_cr3, start_kernel_stack, start_user_stack, start_rip
	.globl start_tss_selector, boot_params_gpa, pvh_start_info_gpa
start_cr3:
	.quad boot_pml4
start_kernel_stack:
	.quad kernel_stack0 + KERNEL_STACK_BYTES
start_user_stack:
	.quad user_stack0 + USER_STACK_BYTES - 8 /* as after a call */
start_rip:
	.quad runtime_start
start_tss_selector:
	.quad SEL_TSS0
/* Not in .bss: not every loader zeroes it before these are written. */
boot_params_gpa:
	.quad 0
pvh_start_info_gpa:
	.quad 0

	.balign 16
	.globl gdt
gdt:
	.quad 0
	.quad 0x00af9b000000ffff /* 0x08 64-bit code, CPL0 */
	.quad 0x00cf93000000ffff /* 0x10 data, CPL0 */
	.quad 0x00affb000000ffff /* 0x18 64-bit code, CPL3 */
	.quad 0x00cff3000000ffff /* 0x20 data, CPL3 */
	.quad 0x00cf9b000000ffff /* 0x28 32-bit code, CPL0 */
	.quad 0x0000890000000000 | TSS_LIMIT /* 0x30 the BSP's TSS */
	.quad 0
	.fill (GDT_ENTRIES - 8), 8, 0

gdt_pointer:
	.word GDT_ENTRIES * 8 - 1
	.quad gdt
	.balign 8
idt_pointer:
	.word 256 * 16 - 1
	.quad idt

/*
 * The tables C starts with: the first GiB, user-accessible, accessed and dirty
 * bits set so that the CPU never has to write them.
 */
	.balign 4096
boot_pml4:
	.quad boot_pdpt + 0x27
	.fill 511, 8, 0
boot_pdpt:
	.quad boot_pd + 0x27
	.fill 511, 8, 0
boot_pd:
	.set address, 0
	.rept 512
	.quad address + 0xe7
	.set address, address + 0x200000
	.endr

	.bss
	.balign 4096
	.globl idt
idt:
	.skip 4096
kernel_stack0:
	.skip KERNEL_STACK_BYTES
user_stack0:
	.skip USER_STACK_BYTES
	.balign 16
tss0:
	.skip TSS_BYTES

	.section .note.GNU-stack, "", @progbits
