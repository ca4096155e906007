# A guest that sleeps (S3) and keeps time. It prints "> " and then follows single letters:
#
#   k  turn kvmclock on (its page is at PVCLOCK)
#   z  sleep, waking at real mode code; it prints "W", the number of times it woke up so far and PM1
#      status (in hexadecimal), and then follows letters in real mode
#   a  have the real-time clock's alarm go off each second and wake the machine, and sleep
#   n  sleep without a waking vector
#   h  halt
#   p  power off
#
# A vmlinux for pyvmm: entered at _start in 64-bit mode. The ports are those of pyvmm/layout.py.

    .set COM1, 0x3f8
    .set LSR, COM1 + 5
    .set PM1_EVENTS, 0x600
    .set PM1_CONTROL, 0x604
    .set CMOS, 0x70
    .set FACS_WAKING_VECTOR, 0xe0040 + 12
    .set PVCLOCK, 0x4000
    .set REAL_MODE, 0x8000          # where the code after waking is copied to
    .set WAKES, 0x4800
    .set MSR_KVM_SYSTEM_TIME_NEW, 0x4b564d01

    .section .text
    .globl _start
    .code64
_start:
    mov $real_mode, %esi
    mov $REAL_MODE, %edi
    mov $real_mode_end - real_mode, %ecx
    rep movsb
    movb $'0', WAKES
    mov $'>', %al
    call put
    mov $' ', %al
    call put
next:
    mov $LSR, %dx
    in %dx, %al
    test $1, %al
    jz next
    mov $COM1, %dx
    in %dx, %al
    cmp $'k', %al
    je clock
    cmp $'z', %al
    je sleep
    cmp $'a', %al
    je alarm
    cmp $'n', %al
    je sleep_for_good
    cmp $'h', %al
    je halt
    cmp $'p', %al
    je power_off
    jmp next

put:
    mov $COM1, %dx
    out %al, %dx
    ret

clock:
    mov $MSR_KVM_SYSTEM_TIME_NEW, %ecx
    mov $PVCLOCK | 1, %eax
    xor %edx, %edx
    wrmsr
    mov $'k', %al
    call put
    jmp next

halt:
    cli
    hlt
    jmp halt

alarm:
    mov $1, %al                     # seconds, minutes and hours of the alarm: any
    call any
    mov $3, %al
    call any
    mov $5, %al
    call any
    mov $0xb, %al                   # register B: 24 hours, alarm interrupt
    out %al, $CMOS
    mov $0x22, %al
    out %al, $CMOS + 1
    mov $PM1_EVENTS + 2, %dx        # PM1 enable: the real-time clock
    mov $1 << 10, %ax
    out %ax, %dx
sleep:
    movl $REAL_MODE, FACS_WAKING_VECTOR
sleep_for_good:
    mov $PM1_CONTROL, %dx
    mov $1 << 13 | 1 << 10, %ax
    out %ax, %dx
    hlt                             # never reached

any:
    out %al, $CMOS
    mov $0xff, %al
    out %al, $CMOS + 1
    ret

power_off:
    mov $PM1_CONTROL, %dx
    mov $1 << 13 | 5 << 10, %ax
    out %ax, %dx
    hlt

# At CS:IP = 0x800:0 after waking up, with nothing set up.
    .code16
real_mode:
    xor %ax, %ax
    mov %ax, %ds
    mov %ax, %ss
    mov $REAL_MODE, %sp
    mov $'W', %al
    call put16
    incb WAKES
    mov WAKES, %al
    call put16
    mov $PM1_EVENTS, %dx
    in %dx, %ax
    mov %ax, %bx
    mov $4, %cx
digit:
    rol $4, %bx
    mov %bl, %al
    and $0xf, %al
    add $'0', %al
    cmp $'9', %al
    jbe decimal
    add $'a' - '9' - 1, %al
decimal:
    call put16
    loop digit
    mov $PM1_EVENTS, %dx            # clear what was read
    mov %bx, %ax
    out %ax, %dx
wait16:
    mov $LSR, %dx
    in %dx, %al
    test $1, %al
    jz wait16
    mov $COM1, %dx
    in %dx, %al
    mov $PM1_CONTROL, %dx
    cmp $'z', %al
    mov $1 << 13 | 1 << 10, %ax
    je out16
    mov $1 << 13 | 5 << 10, %ax
out16:
    out %ax, %dx
    hlt

put16:
    mov $COM1, %dx
    out %al, %dx
    ret
real_mode_end:
