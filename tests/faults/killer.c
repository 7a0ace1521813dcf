/* Ends the process by SIGKILL before or after the n-th call that changes the file system.

   Preloaded (LD_PRELOAD) into a test process; armed with killer_arm(n, mode):
   mode 0: before the call; 1: after it; 2: a write writes half of its bytes first. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

static long left = -1;
static int mode;
static long calls;

void killer_arm(long n, int how) { left = n; mode = how; calls = 0; }
long killer_calls(void) { return calls; }

static void die(void) { kill(getpid(), SIGKILL); for (;;) pause(); }
static int now(void) { calls++; return left > 0 && --left == 0; }

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))
#define WRAP(name, params, args)                                                   \
    int name params {                                                              \
        int hit = now();                                                           \
        if (hit && mode != 1) die();                                               \
        int result = REAL(name) args;                                              \
        if (hit) die();                                                            \
        return result;                                                             \
    }

WRAP(mkdir, (const char *p, mode_t m), (p, m))
WRAP(rename, (const char *a, const char *b), (a, b))
WRAP(renameat2, (int a, const char *b, int c, const char *d, unsigned f), (a, b, c, d, f))
WRAP(link, (const char *a, const char *b), (a, b))
WRAP(linkat, (int a, const char *b, int c, const char *d, int f), (a, b, c, d, f))
WRAP(unlink, (const char *p), (p))
WRAP(unlinkat, (int d, const char *p, int f), (d, p, f))
WRAP(rmdir, (const char *p), (p))
WRAP(fsync, (int fd), (fd))
WRAP(fdatasync, (int fd), (fd))
WRAP(ftruncate, (int fd, off_t n), (fd, n))
WRAP(ftruncate64, (int fd, off64_t n), (fd, n))
WRAP(close, (int fd), (fd))

ssize_t write(int fd, const void *data, size_t n) {
    int hit = now();
    if (hit && mode == 2 && n > 1) syscall(SYS_write, fd, data, n / 2);
    if (hit && mode != 1) die();
    ssize_t result = syscall(SYS_write, fd, data, n);
    if (hit) die();
    return result;
}

#define OPEN(name)                                                                 \
    int name(const char *p, int flags, ...) {                                      \
        va_list rest;                                                              \
        va_start(rest, flags);                                                     \
        mode_t m = va_arg(rest, mode_t);                                           \
        va_end(rest);                                                              \
        int hit = (flags & (O_CREAT | O_WRONLY | O_RDWR)) && now();                \
        if (hit && mode != 1) die();                                               \
        int result = syscall(SYS_openat, AT_FDCWD, p, flags, m);                   \
        if (hit) die();                                                            \
        return result;                                                             \
    }

OPEN(open)
OPEN(open64)
