/* What pyvmm.nested and the init of the emulated machine say to each other.
 *
 * Six virtio-serial ports, each an in-order byte stream with its own flow control. Data ports
 * carry nothing but data; the control port carries one start message (host to machine, format in
 * pyvmm/nested/session.py) and then records of fixed size in both directions. A data stream ends
 * at the byte count that a record names, as a virtio-serial port itself has no end of file.
 */
#ifndef NESTED_PROTOCOL_H
#define NESTED_PROTOCOL_H

#include <stdint.h>

enum nested_port {
    PORT_CONTROL = 1,
    PORT_STDIN,
    PORT_STDOUT,
    PORT_STDERR,
    PORT_TERMINAL,
    PORT_SOCKETS, /* not the init's: pyvmm/nested/forward.py has both ends */
};

enum nested_kind {
    /* host to machine */
    KIND_SIGNAL = 1, /* value: signal number for the command's process group */
    KIND_WINDOW,     /* count[0], count[1]: rows, columns of the terminal */
    KIND_END,        /* value: PORT_STDIN; count[0]: bytes that the stream has in all */
    KIND_CLOSED,     /* value: PORT_STDOUT or PORT_STDERR: nobody reads it any more */
    /* machine to host */
    KIND_HELLO, /* the machine is ready and waits for the start message */
    KIND_ALIVE, /* every HEARTBEAT_MS */
    KIND_EXIT,  /* value: wait status; count[]: bytes sent on stdout, stderr, terminal */
};

struct nested_record {
    uint32_t kind;
    uint32_t value;
    uint64_t count[3];
};

#define HEARTBEAT_MS 2000

#endif
