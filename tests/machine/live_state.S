# A guest with live state: a TSC-deadline timer that re-arms itself at CPL0, and AVX registers
# that code at CPL3 compares with what they must be, for ever. The host reads the words at
# 0x108000: ticks, loops, bad.
.set COUNTERS, 0x108000
.set TICKS, COUNTERS
.set LOOPS, COUNTERS + 8
.set BAD, COUNTERS + 16
.set PERIOD, 2000000
.set LOAD, 0x100000

start:
    mov $0xff, %al                  # the old interrupt controllers are not used
    out %al, $0x21
    out %al, $0xa1
    orq $4, 0x9000                  # the first 16 MiB are for CPL3 too
    orq $4, 0xa000
    mov $0xb000, %edi
    mov $8, %ecx
1:  orq $4, (%rdi)
    add $8, %edi
    dec %ecx
    jnz 1b
    mov %cr3, %rax
    mov %rax, %cr3
    mov %cr4, %rax                  # OSFXSR, OSXMMEXCPT, OSXSAVE
    or $0x40600, %eax
    mov %rax, %cr4
    xor %ecx, %ecx
    xor %edx, %edx
    mov $7, %eax
    xsetbv

    lea tss(%rip), %rax             # the task state segment's descriptor
    mov %ax, LOAD + (gdt - start) + 0x2a
    shr $16, %eax
    mov %al, LOAD + (gdt - start) + 0x2c
    mov %ah, LOAD + (gdt - start) + 0x2f
    lgdt gdtr(%rip)
    mov $0x28, %ax
    ltr %ax
    lea tick(%rip), %rax            # the timer's gate, vector 0x40
    mov %ax, LOAD + (idt - start) + 0x400
    shr $16, %eax
    mov %ax, LOAD + (idt - start) + 0x406
    lidt idtr(%rip)

    mov $0xfee00000, %edi
    movl $0x1ff, 0xf0(%rdi)
    movl $0x40040, 0x320(%rdi)      # TSC-deadline mode
    mfence
    call arm

    pushq $0x23                     # to CPL3, interrupts on
    pushq $0x120000
    pushq $0x202
    pushq $0x3b
    lea user(%rip), %rax
    push %rax
    iretq

arm:
    rdtsc
    shl $32, %rdx
    or %rdx, %rax
    add $PERIOD, %rax
    mov %rax, %rdx
    shr $32, %rdx
    mov $0x6e0, %ecx
    wrmsr
    ret

tick:
    push %rax
    push %rcx
    push %rdx
    incq TICKS
    call arm
    mov $0xfee00000, %eax
    movl $0, 0xb0(%rax)
    pop %rdx
    pop %rcx
    pop %rax
    iretq

user:
    vmovdqu pattern(%rip), %ymm7
    mov $0x1122334455667788, %r15
    mov %r15, %r14
2:  incq LOOPS
    vpcmpeqb pattern(%rip), %ymm7, %ymm1
    vpmovmskb %ymm1, %eax
    cmp $-1, %eax
    jne 3f
    cmp %r15, %r14
    je 2b
3:  incq BAD
    jmp 2b

    .balign 32
pattern:
    .byte 1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16,17,18,19,20,21,22,23,24,25,26,27,28,29,30,31,32
    .balign 16
gdt:
    .quad 0, 0, 0x00af9b000000ffff, 0x00cf93000000ffff, 0x00cff3000000ffff
    .quad 0x0000890000000067, 0     # 0x28: task state segment
    .quad 0x00affb000000ffff        # 0x38: code at CPL3
gdtr:
    .word 0x3f
    .quad LOAD + (gdt - start)
    .balign 16
tss:
    .long 0
    .quad 0x110000                  # RSP0
    .skip 92
    .balign 16
idt:
    .skip 0x400
    .quad 0x00008e0000100000, 0
idtr:
    .word 0x40f
    .quad LOAD + (idt - start)
