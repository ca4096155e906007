/* What a datagram costs between the rings and a socket of the host: CPU time of the device's thread,
 * on which libslirp runs, system calls included. */
#include <stdio.h>

#ifdef HAVE_SLIRP
#include <time.h>

#include "user_driver.h"

#define ROUNDS 5000u
#define PER_ROUND 32u

static const struct {
    const char *name;
    uint32_t size;
    bool to_guest;
} shapes[] = {
    {"to the host, 64 bytes", 64, false},
    {"to the host, 1400 bytes", 1400, false},
    {"to the guest, 64 bytes", 64, true},
    {"to the guest, 1400 bytes", 1400, true},
};
#define SHAPES (sizeof(shapes) / sizeof(shapes[0]))

static double cpu_ns(pthread_t thread)
{
    struct timespec time;
    clockid_t clock;

    CHECK(pthread_getcpuclockid(thread, &clock) == 0 && clock_gettime(clock, &time) == 0);
    return (double)time.tv_sec * 1e9 + (double)time.tv_nsec;
}

static double measure(uint32_t size, bool to_guest)
{
    static uint8_t data[NET_BUFFER];
    struct user user;
    struct sockaddr_in guest;
    socklen_t guest_size = sizeof(guest);
    double before, spent;
    uint32_t got;

    user_create(&user);
    net_driver_fill(&user.driver);
    introduce(&user);
    /* One more, by which the host learns where the guest is. */
    send_frame(&user, 0, put_datagram(tx_frame(&user, 0), user.port, 0, size));
    CHECK(recvfrom(user.socket, data, sizeof(data), 0, (struct sockaddr *)&guest, &guest_size) > 0);
    before = cpu_ns(user.driver.thread);
    for (unsigned round = 0; round < ROUNDS; round++) {
        for (uint16_t i = 0; i < PER_ROUND; i++) {
            if (to_guest)
                CHECK(sendto(user.socket, data, size, 0, (struct sockaddr *)&guest,
                             guest_size) == (ssize_t)size);
            else
                offer_frame(&user, i, put_datagram(tx_frame(&user, i), user.port, i, size));
        }
        net_ring_publish(&user.driver.ring[1]);
        for (unsigned i = 0; i < PER_ROUND; i++) {
            if (to_guest)
                receive(&user, &got);
            else
                await(&user.driver.ring[1]);
        }
        while (recv(user.socket, data, sizeof(data), MSG_DONTWAIT) > 0)
            ;
    }
    spent = cpu_ns(user.driver.thread) - before;
    user_destroy(&user);
    return spent / (ROUNDS * PER_ROUND);
}
#endif

int main(void)
{
#ifdef HAVE_SLIRP
    printf("%-30s %10s\n", "a datagram, user network", "ns");
    for (size_t i = 0; i < SHAPES; i++)
        printf("%-30s %10.1f\n", shapes[i].name, measure(shapes[i].size, shapes[i].to_guest));
#else
    printf("without libslirp there is no user network\n");
#endif
    return 0;
}
