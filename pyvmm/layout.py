"""The guest-physical address map and the I/O ports, which boot, platform and machine share.

======================== ==========================================================
0x0000_0000              RAM, up to 3 GiB (``LOW_RAM_END``)
0xC000_0000              reserved for PCI memory windows
0xD000_0000              virtio-mmio register pages, 4 KiB each
0xFEC0_0000, 0xFEE0_0000 I/O APIC, local APICs (in the kernel)
0xFFFB_C000              identity map and TSS pages that KVM needs on Intel hosts
0x1_0000_0000            the RAM that does not fit below 3 GiB
======================== ==========================================================
"""

from __future__ import annotations

PAGE_SIZE = 0x1000

LOW_RAM_END = 0xC000_0000
HIGH_RAM_START = 0x1_0000_0000

VIRTIO_MMIO_BASE = 0xD000_0000
VIRTIO_MMIO_STRIDE = PAGE_SIZE

IOAPIC_BASE = 0xFEC0_0000
LOCAL_APIC_BASE = 0xFEE0_0000
KVM_IDENTITY_MAP = 0xFFFB_C000
KVM_TSS = 0xFFFB_D000

# What the boot loader puts below 1 MiB. 0x9FC00 to 0xFFFFF is reserved in the e820 map.
ZERO_PAGE = 0x7000
BOOT_STACK = 0x8FF0
BOOT_PAGE_TABLES = 0x9000
BOOT_GDT = 0x500
COMMAND_LINE = 0x2_0000
LOW_RAM_USABLE_END = 0x9_FC00
MP_TABLE = 0x9_FC00
ACPI_RSDP = 0xE_0000
ACPI_FACS = 0xE_0040
ACPI_TABLES_END = 0xF_0000
MP_CONFIG_TABLE = 0xF_0000
HIGH_MEMORY_START = 0x10_0000

# I/O ports and their interrupts (GSI numbers).
CMOS_PORT = 0x70
CMOS_CENTURY = 0x32  # where in CMOS memory the RTC keeps it
RTC_GSI = 8
COM1_PORT = 0x3F8
COM1_GSI = 4
PM1_EVENT_PORT = 0x600
PM1_CONTROL_PORT = 0x604
RESET_PORT = 0xCF9
RESET_VALUE = 0x06
I8042_DATA_PORT = 0x60
I8042_COMMAND_PORT = 0x64
PVPANIC_PORT = 0x505
ACPI_SCI_GSI = 9
ACPI_S3_SLEEP_TYPE = 1  # SLP_TYP
ACPI_S5_SLEEP_TYPE = 5
# GSIs that virtio-mmio devices may take, in this order; past the last they are shared.
VIRTIO_GSIS = (16, 17, 18, 19, 20, 21, 22, 23, 5, 10, 11, 12, 6, 7, 14, 15)
