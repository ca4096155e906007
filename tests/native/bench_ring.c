/* What the ring costs: nanoseconds and instructions a chain, from pop to publish.
 *
 *   bench_ring                  a table of all shapes
 *   bench_ring --count SHAPE    serves one full queue of that shape, for callgrind
 *
 * Instructions come from the processor's counter, or, where perf_event_open gives none (in most
 * virtual machines), from callgrind, which executes the same program. The time is the median of
 * many full queues. */
#include <linux/perf_event.h>
#include <sys/ioctl.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "fake_driver.h"

#define QUEUE_SIZE 256u
#define ROUNDS 10000u

static const struct {
    const char *name;
    struct fake_shape shape;
    bool each; /* publish after each chain, else once for the queue */
} shapes[] = {
    {"1 descriptor", {1, 64, false}, false},
    {"1 descriptor, published each", {1, 64, false}, true},
    {"3 descriptors", {3, 64, false}, false},
    {"3 indirect descriptors", {3, 64, true}, false},
    {"16 indirect descriptors", {16, 64, true}, false},
};
#define SHAPES (sizeof(shapes) / sizeof(shapes[0]))

/* The device's side, and all that is measured. */
static __attribute__((noinline)) unsigned serve(struct virtq *vq, struct virtq_chain *chain, bool each)
{
    unsigned count = 0;

    while (virtq_pop(vq, chain) == VIRTQ_CHAIN) {
        virtq_push(vq, chain->head, 1);
        if (each)
            virtq_publish(vq);
        count++;
    }
    virtq_publish(vq);
    return count;
}

static uint64_t now(void)
{
    struct timespec time;

    clock_gettime(CLOCK_MONOTONIC, &time);
    return (uint64_t)time.tv_sec * 1000000000u + (uint64_t)time.tv_nsec;
}

static int compare(const void *left, const void *right)
{
    double difference = *(const double *)left - *(const double *)right;

    return (difference > 0) - (difference < 0);
}

static uint64_t read_counter(int fd)
{
    uint64_t count = 0;

    return fd >= 0 && read(fd, &count, sizeof(count)) == sizeof(count) ? count : 0;
}

struct cost {
    double ns;
    double instructions; /* 0 without a counter */
};

static struct cost measure(size_t index, unsigned rounds, int counter)
{
    struct fake_driver driver;
    struct virtq vq;
    struct iovec iov[QUEUE_SIZE];
    struct virtq_chain chain = {.iov = iov};
    static double ns[ROUNDS]; /* per chain, of each round */
    uint64_t chains = 0, instructions = 0;

    fake_driver_create(&driver, QUEUE_SIZE, true, shapes[index].shape);
    CHECK(virtq_init(&vq, &driver.mem, &driver.config) == 0);
    for (unsigned round = 0; round < rounds; round++) {
        uint64_t ns_before, instructions_before;
        unsigned served;

        while (fake_driver_add(&driver))
            ;
        fake_driver_publish(&driver);
        instructions_before = read_counter(counter);
        ns_before = now();
        served = serve(&vq, &chain, shapes[index].each);
        ns[round] = (double)(now() - ns_before) / served;
        instructions += read_counter(counter) - instructions_before;
        chains += served;
        fake_driver_collect(&driver);
    }
    qsort(ns, rounds, sizeof(ns[0]), compare);
    CHECK(vq.malformed == 0 && !vq.broken);
    fake_driver_destroy(&driver);
    return (struct cost){ns[rounds / 2], (double)instructions / (double)chains};
}

static int open_counter(void)
{
    struct perf_event_attr attr = {
        .type = PERF_TYPE_HARDWARE,
        .size = sizeof(attr),
        .config = PERF_COUNT_HW_INSTRUCTIONS,
        .exclude_kernel = 1,
        .exclude_hv = 1,
    };

    return (int)syscall(SYS_perf_event_open, &attr, 0, -1, -1, PERF_FLAG_FD_CLOEXEC);
}

/* Instructions a chain as callgrind counts them, or 0. */
static double count_with_callgrind(const char *self, size_t index)
{
    char command[4096], line[256];
    unsigned long long collected = 0;
    unsigned chains = QUEUE_SIZE;
    FILE *valgrind;

    if (!shapes[index].shape.indirect)
        chains /= shapes[index].shape.descriptors;
    snprintf(command, sizeof(command),
             "valgrind --tool=callgrind --callgrind-out-file=/dev/null --toggle-collect=serve "
             "'%s' --count %zu 2>&1", self, index);
    valgrind = popen(command, "r");
    if (!valgrind)
        return 0;
    while (fgets(line, sizeof(line), valgrind)) {
        const char *found = strstr(line, "Collected : ");

        if (found)
            collected = strtoull(found + strlen("Collected : "), NULL, 10);
    }
    return pclose(valgrind) == 0 ? (double)collected / chains : 0;
}

int main(int argc, char **argv)
{
    int counter;

    if (argc == 3 && strcmp(argv[1], "--count") == 0) {
        measure(strtoul(argv[2], NULL, 10) % SHAPES, 1, -1);
        return 0;
    }
    counter = open_counter();
    printf("%-30s %10s %14s\n", "ring, per chain", "ns", "instructions");
    for (size_t index = 0; index < SHAPES; index++) {
        struct cost cost = measure(index, ROUNDS, counter);

        if (counter < 0)
            cost.instructions = count_with_callgrind(argv[0], index);
        printf("%-30s %10.1f ", shapes[index].name, cost.ns);
        if (cost.instructions > 0)
            printf("%14.1f\n", cost.instructions);
        else
            printf("%14s\n", "no counter");
        fflush(stdout);
    }
    return 0;
}
