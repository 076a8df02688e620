/*
 * Lets linux.uml 6.1 run on processors whose register state is larger than it knows.
 *
 * User-Mode Linux keeps a guest process's extended registers in 2696 bytes and hands that much to
 * PTRACE_SETREGSET(NT_X86_XSTATE). Where the processor has AMX, the machine's kernel wants the
 * full 11008 bytes and answers EFAULT, which panics the guest. This ptrace(), preloaded into
 * linux.uml, adds the missing tail: it is zero, because no guest process can have asked for AMX.
 */
#define _GNU_SOURCE
#include <elf.h>
#include <errno.h>
#include <stdarg.h>
#include <string.h>
#include <sys/ptrace.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

/* The largest register state that a kernel may answer: AMX needs 11008 bytes. */
#define XSTATE_MAX 16384

static size_t kernel_size; /* what this machine's kernel answers; 0: not asked yet */

/* Not on the stack: linux.uml calls from its guest's kernel stacks, which are 16 KiB small. Only
 * its one processor thread traces, so there is one caller at a time. */
static unsigned char full[XSTATE_MAX] __attribute__((aligned(64)));

static long regset(long request, long pid, struct iovec *caller)
{
	struct iovec iov = { .iov_base = full, .iov_len = sizeof full };

	if (request == PTRACE_GETREGSET || kernel_size == 0) {
		long result = syscall(SYS_ptrace, PTRACE_GETREGSET, pid, NT_X86_XSTATE, &iov);
		if (result != 0)
			return result;
		kernel_size = iov.iov_len;
	}
	if (caller->iov_len > kernel_size)
		caller->iov_len = kernel_size;
	if (request == PTRACE_GETREGSET) {
		memcpy(caller->iov_base, full, caller->iov_len);
		return 0;
	}
	memset(full, 0, sizeof full);
	memcpy(full, caller->iov_base, caller->iov_len);
	iov.iov_len = kernel_size;
	return syscall(SYS_ptrace, request, pid, NT_X86_XSTATE, &iov);
}

long ptrace(enum __ptrace_request request, ...)
{
	va_list args;
	va_start(args, request);
	long pid = va_arg(args, pid_t);
	void *addr = va_arg(args, void *);
	void *data = va_arg(args, void *);
	va_end(args);

	if ((request == PTRACE_GETREGSET || request == PTRACE_SETREGSET) &&
	    addr == (void *)NT_X86_XSTATE)
		return regset(request, pid, data);
	if (request == PTRACE_PEEKTEXT || request == PTRACE_PEEKDATA || request == PTRACE_PEEKUSER) {
		long word;
		if (syscall(SYS_ptrace, request, pid, addr, &word) != 0)
			return -1;
		errno = 0;
		return word;
	}
	return syscall(SYS_ptrace, request, pid, addr, data);
}
