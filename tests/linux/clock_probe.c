/* Looks at the clocks of a Linux guest.
 *
 *   clock_probe serve         answers each byte on standard input with a line of CLOCK_REALTIME,
 *                             CLOCK_MONOTONIC and CLOCK_BOOTTIME, in nanoseconds
 *   clock_probe race SECONDS  a thread on each CPU compares what it reads with the latest that any of
 *                             them has read; says how many reads there were and how many went back,
 *                             and ends with status 1 if any did
 */
#define _GNU_SOURCE
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

static int64_t now(clockid_t clock)
{
    struct timespec t;
    clock_gettime(clock, &t);
    return t.tv_sec * 1000000000LL + t.tv_nsec;
}

static int serve(void)
{
    char byte;
    while (read(STDIN_FILENO, &byte, 1) == 1) {
        char line[80];
        int length = snprintf(line, sizeof(line), "%lld %lld %lld\n", (long long)now(CLOCK_REALTIME),
                              (long long)now(CLOCK_MONOTONIC), (long long)now(CLOCK_BOOTTIME));
        if (write(STDOUT_FILENO, line, length) != length)
            return 1;
    }
    return 0;
}

static _Atomic int64_t latest;
static _Atomic int64_t worst; /* step back, in ns */
static _Atomic uint64_t reads;
static _Atomic uint64_t backward;
static int64_t end;

static void *race(void *argument)
{
    cpu_set_t cpus;
    CPU_ZERO(&cpus);
    CPU_SET((intptr_t)argument, &cpus);
    if (pthread_setaffinity_np(pthread_self(), sizeof(cpus), &cpus)) {
        perror("setaffinity");
        exit(2);
    }
    uint64_t count = 0;
    for (;;) {
        int64_t before = atomic_load(&latest);
        int64_t mine = now(CLOCK_MONOTONIC);
        count++;
        if (mine < before) {
            atomic_fetch_add(&backward, 1);
            int64_t step = atomic_load(&worst);
            while (before - mine > step && !atomic_compare_exchange_weak(&worst, &step, before - mine))
                ;
        }
        while (mine > before && !atomic_compare_exchange_weak(&latest, &before, mine))
            ;
        if (mine > end)
            break;
    }
    atomic_fetch_add(&reads, count);
    return NULL;
}

int main(int argc, char **argv)
{
    if (argc == 2 && !strcmp(argv[1], "serve"))
        return serve();
    if (argc != 3 || strcmp(argv[1], "race")) {
        fprintf(stderr, "usage: clock_probe serve | race SECONDS\n");
        return 2;
    }
    long cpus = sysconf(_SC_NPROCESSORS_ONLN);
    pthread_t threads[cpus];
    end = now(CLOCK_MONOTONIC) + atoll(argv[2]) * 1000000000LL;
    for (long i = 0; i < cpus; i++) {
        if (pthread_create(&threads[i], NULL, race, (void *)(intptr_t)i)) {
            perror("pthread_create");
            return 2;
        }
    }
    for (long i = 0; i < cpus; i++)
        pthread_join(threads[i], NULL);
    printf("%ld CPUs, %llu reads, %llu backward, at most %lld ns\n", cpus,
           (unsigned long long)reads, (unsigned long long)backward, (long long)worst);
    return backward != 0;
}
