//! The guests, in assembly. Each is position independent; fixed addresses are those of
//! `bench.rs`.

use std::arch::asm;

/// Assembles the lines into read-only data, and returns the bytes.
macro_rules! guest {
    ($(#[$doc:meta])* $name:ident: $($line:literal)*) => {
        $(#[$doc])*
        #[expect(unsafe_code, reason = "assembles a guest")]
        pub(crate) fn $name() -> &'static [u8] {
            let start: *const u8;
            let end: *const u8;
            // SAFETY: only the two last instructions are executed here: they load addresses
            // of the other section's content.
            unsafe {
                asm!(
                    ".pushsection .rodata.guest, \"a\"",
                    "9990:",
                    $($line,)*
                    "9991:",
                    ".popsection",
                    "lea {0}, [rip + 9990b]",
                    "lea {1}, [rip + 9991b]",
                    out(reg) start,
                    out(reg) end,
                    options(nomem, nostack, preserves_flags),
                );
            }
            // SAFETY: both are in one section of read-only data.
            unsafe { std::slice::from_raw_parts(start, end as usize - start as usize) }
        }
    };
}

guest! {
    /// Reads and writes ports in each width, and echoes the values that it read.
    ports:
    "mov eax, 0x44332211"
    "out 0x10, al"
    "out 0x10, ax"
    "out 0x10, eax"
    "xor eax, eax"
    "in al, 0x11"
    "out 0x12, eax"
    "xor eax, eax"
    "in ax, 0x11"
    "out 0x12, eax"
    "in eax, 0x11"
    "out 0x12, eax"
    "out 0x80, al"
    "2: hlt"
    "jmp 2b"
}

guest! {
    /// Reads and writes device memory at 1 MiB in each width.
    device_memory:
    "mov rbx, 0x100000"
    "mov rax, 0x8877665544332211"
    "mov [rbx], al"
    "mov [rbx + 2], ax"
    "mov [rbx + 4], eax"
    "mov [rbx + 8], rax"
    "xor eax, eax"
    "mov al, [rbx]"
    "out 0x12, eax"
    "xor eax, eax"
    "mov ax, [rbx + 2]"
    "out 0x12, eax"
    "mov eax, [rbx + 4]"
    "out 0x12, eax"
    "mov rax, [rbx + 8]"
    "shr rax, 32"
    "out 0x12, eax"
    "out 0x80, al"
    "2: hlt"
    "jmp 2b"
}

guest! {
    /// String output of five bytes, string input of three words.
    strings:
    "cld"
    "lea rsi, [rip + 3f]"
    "mov edx, 0x10"
    "mov ecx, 5"
    "rep outsb"
    "mov edi, 0x5000"
    "mov edx, 0x11"
    "mov ecx, 3"
    "rep insw"
    "out 0x80, al"
    "2: hlt"
    "jmp 2b"
    "3: .ascii \"hello\""
}

guest! {
    /// A page fault without a handler.
    triple_fault:
    "mov eax, [0x40000000]"
}

guest! {
    /// Moves a word from device memory to an unmapped address: KVM completes the read and
    /// has a page fault to deliver.
    faults_after_an_access:
    "cld"
    "mov esi, 0x100000"
    "mov edi, 0x40001230"
    "movsq"
    "2: hlt"
    "jmp 2b"
}

guest! {
    /// The handler of a page fault: stores the faulting address.
    notes_fault:
    "mov rax, cr2"
    "mov [0x5000], rax"
    "out 0x80, al"
    "2: hlt"
    "jmp 2b"
}

guest! {
    /// Spins, and regularly reports that it runs.
    spin:
    "out 0x12, al"
    "2: inc qword ptr [0x5000]"
    "test word ptr [0x5000], 0xfff"
    "jnz 2b"
    "out 0x12, al"
    "jmp 2b"
}

guest! {
    /// Reads a port repeatedly; counts in a register and in memory.
    reads:
    "xor ebx, ebx"
    "2: in eax, 0x11"
    "inc rbx"
    "mov [0x5000], rbx"
    "jmp 2b"
}

guest! {
    /// Routes GSI 5 to vector 0x40, and halts until three interrupts have arrived. There is
    /// no 8259, so it is not masked here; nor is LINT0.
    halts:
    "mov r11d, 0xfee00000"
    "mov dword ptr [r11 + 0xf0], 0x1ff"
    "mov r10d, 0xfec00000"
    "mov dword ptr [r10], 0x1b"
    "mov dword ptr [r10 + 0x10], 0"
    "mov dword ptr [r10], 0x1a"
    "mov dword ptr [r10 + 0x10], 0x40"
    "2: out 0x12, al"
    "sti"
    "hlt"
    "cli"
    "cmp dword ptr [0x5000], 3"
    "jne 2b"
    "out 0x80, al"
    "3: hlt"
    "jmp 3b"
}

guest! {
    /// Handler of vector 0x40: counts.
    count_interrupt:
    "inc dword ptr [0x5000]"
    "mov r11d, 0xfee00000"
    "mov dword ptr [r11 + 0xb0], 0"
    "iretq"
}

guest! {
    /// Writes 1, 2 and 1 again to the doorbell.
    rings:
    "mov rbx, 0x100050"
    "mov dword ptr [rbx], 1"
    "mov dword ptr [rbx], 2"
    "mov dword ptr [rbx], 1"
    "out 0x80, al"
    "2: hlt"
    "jmp 2b"
}

guest! {
    /// Starts all other processors, and waits until the number at 0x5004 has started.
    starts_others:
    "mov r11d, 0xfee00000"
    "mov dword ptr [r11 + 0xf0], 0x1ff"
    "mov dword ptr [r11 + 0x300], 0x000c4500"
    "mov dword ptr [r11 + 0x300], 0x000c4609"
    "2: pause"
    "mov eax, [0x5000]"
    "cmp eax, [0x5004]"
    "jne 2b"
    "out 0x80, al"
    "3: hlt"
    "jmp 3b"
}

guest! {
    /// A secondary processor in real mode: reports its APIC id from both leaves.
    secondary:
    ".code16"
    "mov eax, 1"
    "cpuid"
    "shr ebx, 24"
    "mov al, bl"
    "out 0x13, al"
    "mov eax, 0xb"
    "xor ecx, ecx"
    "cpuid"
    "mov al, dl"
    "out 0x14, al"
    "lock inc dword ptr ds:[0x5000]"
    "2: cli"
    "hlt"
    "jmp 2b"
    ".code64"
}

guest! {
    /// Writes pages 3 and 5 of the region at 2 MiB, later page 7.
    writes_pages:
    "mov byte ptr [0x203000], 1"
    "mov byte ptr [0x205fff], 1"
    "out 0x80, al"
    "mov byte ptr [0x207123], 1"
    "out 0x80, al"
    "mov byte ptr [0x208000], 1"
    "mov al, [0x208000]"
    "out 0x80, al"
    "2: hlt"
    "jmp 2b"
}

guest! {
    /// Reads the time-stamp counter before and after a pause.
    reads_time:
    "rdtsc"
    "mov [0x5000], eax"
    "mov [0x5004], edx"
    "out 0x80, al"
    "rdtsc"
    "mov [0x5008], eax"
    "mov [0x500c], edx"
    "out 0x80, al"
    "2: hlt"
    "jmp 2b"
}

guest! {
    /// Sets up state in the kernel, then in user mode (which may use ports), is paused, and
    /// afterwards stores the state that it finds: registers in user mode, the rest in the
    /// handler of an invalid instruction.
    ///
    /// At 0xb000 are the numbers of MSRs (count, then index and value, 16 bytes each); at
    /// 0x5004 bit 0 is AVX and bit 1 AVX-512.
    sets_state:
    // MSRs. Null selectors, because entering user mode unloads the kernel's.
    "xor eax, eax"
    "mov fs, eax"
    "mov gs, eax"
    "mov esi, 0xb000"
    "mov r8d, [rsi]"
    "2: add esi, 16"
    "mov ecx, [rsi]"
    "mov eax, [rsi + 8]"
    "mov edx, [rsi + 12]"
    "wrmsr"
    "dec r8d"
    "jnz 2b"
    // Debug registers: a breakpoint at an unused address.
    "mov rax, 0x11110000"
    "mov dr0, rax"
    "mov rax, 0x22220000"
    "mov dr1, rax"
    "mov rax, 0x33330000"
    "mov dr2, rax"
    "mov rax, 0x44440000"
    "mov dr3, rax"
    "mov eax, 0x402"
    "mov dr7, rax"
    "mov rax, 0x123456789000"
    "mov cr2, rax"
    "mov eax, 2"
    "mov cr8, rax"
    // Local APIC: on, timer masked and counting, logical id; IOAPIC inputs 5, 7.
    "mov r11d, 0xfee00000"
    "mov dword ptr [r11 + 0xf0], 0x1f5"
    "mov dword ptr [r11 + 0xd0], 0x55000000"
    "mov dword ptr [r11 + 0x320], 0x10077"
    "mov dword ptr [r11 + 0x350], 0x10066"
    "mov dword ptr [r11 + 0x3e0], 0xb"
    "mov dword ptr [r11 + 0x380], 0xfffffff0"
    "mov r10d, 0xfec00000"
    "mov dword ptr [r10], 0x1a"
    "mov dword ptr [r10 + 0x10], 0x10040"
    "mov dword ptr [r10], 0x1f"
    "mov dword ptr [r10 + 0x10], 0x12000000"
    // User mode, with access to ports.
    "push 0x23"
    "push 0x7800"
    "push 0x3002"
    "push 0x2b"
    "lea rax, [rip + 3f]"
    "push rax"
    "iretq"
    "3:"
    "fninit"
    "fldpi"
    "mov dword ptr [0x5010], 0x1fa0"
    "ldmxcsr [0x5010]"
    "test dword ptr [0x5004], 2"
    "jnz 4f"
    "test dword ptr [0x5004], 1"
    "jnz 5f"
    ".irp n, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15"
    r"movups xmm\n, [0x6000 + \n * 64]"
    ".endr"
    "jmp 6f"
    "5:"
    ".irp n, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15"
    r"vmovups ymm\n, [0x6000 + \n * 64]"
    ".endr"
    "jmp 6f"
    "4:"
    ".irp n, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31"
    r"vmovups zmm\n, [0x6000 + \n * 64]"
    ".endr"
    ".irp n, 0, 1, 2, 3, 4, 5, 6, 7"
    r"kmovw k\n, [0x6000 + \n * 2]"
    ".endr"
    "6:"
    "mov rbx, 0x1b1b1b1b1b1b1b1b"
    "mov rcx, 0x1c1c1c1c1c1c1c1c"
    "mov rdx, 0x1d1d1d1d1d1d1d1d"
    "mov rsi, 0x5151515151515151"
    "mov rdi, 0xd1d1d1d1d1d1d1d1"
    "mov rbp, 0xb9b9b9b9b9b9b9b9"
    "mov r8, 0x0808080808080808"
    "mov r9, 0x0909090909090909"
    "mov r10, 0x1010101010101010"
    "mov r11, 0x1111111111111111"
    "mov r12, 0x1212121212121212"
    "mov r13, 0x1313131313131313"
    "mov r14, 0x1414141414141414"
    "mov r15, 0x1515151515151515"
    "mov rax, 0xa1a1a1a1a1a1a1a1"
    // Carry and direction are flags that a restore must preserve.
    "std"
    "stc"
    "out 0x80, al"
    // From here on it may be another machine.
    "mov [0x10000], rax"
    "mov [0x10008], rbx"
    "mov [0x10010], rcx"
    "mov [0x10018], rdx"
    "mov [0x10020], rsi"
    "mov [0x10028], rdi"
    "mov [0x10030], rsp"
    "mov [0x10038], rbp"
    "mov [0x10040], r8"
    "mov [0x10048], r9"
    "mov [0x10050], r10"
    "mov [0x10058], r11"
    "mov [0x10060], r12"
    "mov [0x10068], r13"
    "mov [0x10070], r14"
    "mov [0x10078], r15"
    "pushfq"
    "pop qword ptr [0x10080]"
    "cld"
    "mov [0x10088], ds"
    "mov [0x1008a], cs"
    "mov [0x1008c], ss"
    "fstp tbyte ptr [0x10090]"
    "stmxcsr [0x100a0]"
    "mov rax, fs:[0]"
    "mov [0x100a8], rax"
    "mov rax, gs:[0]"
    "mov [0x100b0], rax"
    "test dword ptr [0x5004], 2"
    "jnz 4f"
    "test dword ptr [0x5004], 1"
    "jnz 5f"
    ".irp n, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15"
    r"movups [0x11000 + \n * 64], xmm\n"
    ".endr"
    "jmp 6f"
    "5:"
    ".irp n, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15"
    r"vmovups [0x11000 + \n * 64], ymm\n"
    ".endr"
    "jmp 6f"
    "4:"
    ".irp n, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31"
    r"vmovups [0x11000 + \n * 64], zmm\n"
    ".endr"
    ".irp n, 0, 1, 2, 3, 4, 5, 6, 7"
    r"kmovw [0x10800 + \n * 2], k\n"
    ".endr"
    "6: ud2"
}

guest! {
    /// Handler of an invalid instruction: stores the kernel's part of the state.
    dumps_state:
    "mov esi, 0xb000"
    "mov edi, 0x10100"
    "mov r8d, [rsi]"
    "2: add esi, 16"
    "mov ecx, [rsi]"
    "rdmsr"
    "mov [rdi], eax"
    "mov [rdi + 4], edx"
    "add edi, 8"
    "dec r8d"
    "jnz 2b"
    "mov edi, 0x10400"
    "mov rax, dr0"
    "mov [rdi], rax"
    "mov rax, dr1"
    "mov [rdi + 0x8], rax"
    "mov rax, dr2"
    "mov [rdi + 0x10], rax"
    "mov rax, dr3"
    "mov [rdi + 0x18], rax"
    "mov rax, dr7"
    "mov [rdi + 0x20], rax"
    "mov rax, cr0"
    "mov [rdi + 0x28], rax"
    "mov rax, cr2"
    "mov [rdi + 0x30], rax"
    "mov rax, cr3"
    "mov [rdi + 0x38], rax"
    "mov rax, cr4"
    "mov [rdi + 0x40], rax"
    "mov rax, cr8"
    "mov [rdi + 0x48], rax"
    "sgdt [rdi + 0x50]"
    "sidt [rdi + 0x60]"
    "mov r11d, 0xfee00000"
    "mov edi, 0x10500"
    ".irp n, 0x20, 0x30, 0x80, 0xd0, 0xe0, 0xf0, 0x320, 0x340, 0x350, 0x360, 0x370, 0x380, 0x3e0"
    r"mov eax, [r11 + \n]"
    "mov [rdi], eax"
    "add edi, 4"
    ".endr"
    "mov r10d, 0xfec00000"
    "mov edi, 0x10600"
    "mov ecx, 0"
    "3: mov [r10], ecx"
    "mov eax, [r10 + 0x10]"
    "mov [rdi], eax"
    "add edi, 4"
    "inc ecx"
    "cmp ecx, 0x40"
    "jne 3b"
    "out 0x80, al"
    "4: hlt"
    "jmp 4b"
}
