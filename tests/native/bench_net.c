/* What a frame costs between the rings and the port: nanoseconds and instructions of ours, system
 * calls included in the first alone. The port is a file that takes or gives frames for next to
 * nothing: /dev/null, and a pipe in packet mode.
 *
 *   bench_net                  a table
 *   bench_net --count SHAPE    a short run of that shape, for callgrind
 *
 * Instructions are callgrind's, as in bench_ring. */
#include <fcntl.h>
#include <sys/socket.h>
#include <time.h>

#include "net_driver.h"

#define ROUNDS 20000u
#define COUNT_ROUNDS 64u
#define PER_ROUND 32u /* what the device takes in one turn */

static const struct {
    const char *name;
    uint32_t size;
    bool transmit;
} shapes[] = {
    {"transmit, 60 bytes", 60, true},
    {"transmit, 1514 bytes", 1514, true},
    {"receive, 60 bytes", 60, false},
    {"receive, 1514 bytes", 1514, false},
};
#define SHAPES (sizeof(shapes) / sizeof(shapes[0]))

static uint64_t now(void)
{
    struct timespec time;

    clock_gettime(CLOCK_MONOTONIC, &time);
    return (uint64_t)time.tv_sec * 1000000000u + (uint64_t)time.tv_nsec;
}

/* The frames of one round wait; the device makes one turn. Nanoseconds a frame. */
static double measure(size_t index, unsigned rounds)
{
    static uint8_t frame[2048];
    bool transmit = shapes[index].transmit;
    struct net_driver driver;
    uint64_t spent = 0, frames = 0;
    int fds[2];

    CHECK((transmit ? socketpair(AF_UNIX, SOCK_SEQPACKET, 0, fds)
                    : pipe2(fds, O_DIRECT | O_NONBLOCK)) == 0);
    CHECK(transmit || fcntl(fds[1], F_SETPIPE_SZ, 1 << 20) > 0);
    net_driver_create(&driver, fds[0], transmit ? NET_FRAMING_PACKET : NET_FRAMING_TAP, true);
    net_driver_fill(&driver);
    for (unsigned round = 0; round < rounds; round++) {
        struct net_ring *ring = &driver.ring[transmit];
        const struct vring_used_elem *element;
        uint64_t before;

        for (uint16_t i = 0; i < PER_ROUND; i++) {
            uint32_t size = shapes[index].size + NET_HEADER;

            if (transmit) {
                ring->desc[i].len = size;
                net_ring_offer(ring, i);
            } else {
                CHECK(write(fds[1], frame, size) == (ssize_t)size);
            }
        }
        net_ring_publish(ring);
        virtio_net_pair_stop(driver.pair);
        before = now();
        CHECK(virtio_net_pair_run(driver.pair) == VIRTIO_NET_STOPPED);
        spent += now() - before;
        while ((element = net_ring_collect(ring))) {
            if (transmit)
                CHECK(read(fds[1], frame, sizeof(frame)) == shapes[index].size + NET_HEADER);
            else
                net_ring_offer(ring, (uint16_t)element->id);
            frames++;
        }
    }
    CHECK(frames == (uint64_t)rounds * PER_ROUND);
    net_driver_destroy(&driver);
    close(fds[0]);
    close(fds[1]);
    return (double)spent / (double)frames;
}

/* Instructions a frame as callgrind counts them, or 0. */
static double count_with_callgrind(const char *self, size_t index)
{
    char command[4096], line[256];
    unsigned long long collected = 0;
    FILE *valgrind;

    snprintf(command, sizeof(command),
             "valgrind --tool=callgrind --callgrind-out-file=/dev/null "
             "--toggle-collect=virtio_net_pair_run '%s' --count %zu 2>&1", self, index);
    valgrind = popen(command, "r");
    if (!valgrind)
        return 0;
    while (fgets(line, sizeof(line), valgrind)) {
        const char *found = strstr(line, "Collected : ");

        if (found)
            collected = strtoull(found + strlen("Collected : "), NULL, 10);
    }
    return pclose(valgrind) == 0 ? (double)collected / (COUNT_ROUNDS * PER_ROUND) : 0;
}

int main(int argc, char **argv)
{
    if (argc == 3 && strcmp(argv[1], "--count") == 0) {
        measure(strtoul(argv[2], NULL, 10) % SHAPES, COUNT_ROUNDS);
        return 0;
    }
    printf("%-30s %10s %14s\n", "a frame", "ns", "instructions");
    for (size_t index = 0; index < SHAPES; index++) {
        double instructions = count_with_callgrind(argv[0], index);

        printf("%-30s %10.1f ", shapes[index].name, measure(index, ROUNDS));
        if (instructions > 0)
            printf("%14.1f\n", instructions);
        else
            printf("%14s\n", "no valgrind");
        fflush(stdout);
    }
    return 0;
}
