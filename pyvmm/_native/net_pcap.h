/* Frames recorded as pcapng (draft-ietf-opsawg-pcapng): one enhanced packet block each. */
#ifndef PYVMM_NET_PCAP_H
#define PYVMM_NET_PCAP_H

#include <stdbool.h>
#include <stdint.h>
#include <sys/uio.h>

/* Appends the frame in `iov` to the file, which was opened with O_APPEND and begins with a section
 * header and the description of one interface with time stamps in nanoseconds. One write a frame:
 * several threads may record into one file, and one that is cut off by a crash is whole up to
 * there. Outbound is from the guest. 0 or -errno. */
int net_pcap_write(int fd, bool outbound, const struct iovec *iov, uint32_t count);

#endif
