/* A CD or DVD drive as a SCSI logical unit (SPC-4, MMC-6) with an image as its medium: the one table
 * of what it can do, and the commands that move blocks or are simple. The others are Python's
 * (pyvmm/backends/scsi/cdrom.py), and so are the tray and what is in it. */
#ifndef PYVMM_SCSI_CDROM_H
#define PYVMM_SCSI_CDROM_H

#include "scsi.h"

#define SCSI_CDROM_BLOCK 2048u

/* The limit of one command in bytes. */
#define SCSI_CDROM_MAX_TRANSFER (32u << 20)

struct scsi_cdrom {
    struct scsi_lun lun;
    struct scsi_handoff *handoff; /* to whom commands go that only Python can execute */
    uint8_t prevent;              /* atomic: of PREVENT ALLOW MEDIUM REMOVAL; 0: it is allowed */

    pthread_mutex_t lock; /* for what follows */
    pthread_cond_t idle;
    struct blk_image *image; /* NULL: there is no medium, or the tray is open */
    bool tray_open;
    uint32_t reads; /* of `image`, under way */
};

/* The caller has set `handoff`; there is no medium yet, and the tray is closed. 0 or -errno. */
int scsi_cdrom_init(struct scsi_cdrom *cdrom, const struct scsi_page *pages, uint32_t page_count);
void scsi_cdrom_destroy(struct scsi_cdrom *cdrom);

/* What the drive reads from now on; in place of a medium, only NULL. Returns when nobody uses the
 * earlier one any more. Any thread but that of a worker. */
void scsi_cdrom_set_medium(struct scsi_cdrom *cdrom, struct blk_image *image, bool tray_open);

/* Its commands, also those of the front end and of Python. */
const struct scsi_opcodes *scsi_cdrom_opcodes(void);

#endif
