/* machine_probe: what a build has to do with on this machine: processors, memory, a disk. For the
 * verbs that forecast (annd plan) and advise (annd doctor). */
#ifndef ANND_TOOLS_MACHINE_PROBE_H
#define ANND_TOOLS_MACHINE_PROBE_H

#include <stdbool.h>
#include <stdint.h>

#include "storage/base/error.h"

#define MACHINE_DISK_BYTES (256ull << 20) /* written and read again */

struct machine_disk {
    uint64_t free_bytes;
    uint64_t probe_bytes; /* how much was written; less than asked when the disk is nearly full */
    double write_per_second;  /* bytes, in sequence, until they are durable */
    double read_per_second;   /* bytes, in sequence */
    double random_seconds;    /* of one read of 4 KiB with nothing else in flight, median */
    double random_per_second; /* reads of 4 KiB with MACHINE_DISK_DEPTH in flight */
    bool direct;              /* past the page cache; else reads are of memory, not of the disk */
};
#define MACHINE_DISK_DEPTH 32u

/* Writes, reads and removes a file without a name in `folder`, for two seconds at most after what
 * the writing takes (which stops after some seconds, too). ERR_NOT_FOUND, ERR_IO, ERR_NO_SPACE
 * when not even a few MB are free. Call reader_probe() first. */
int machine_probe_disk(const char *folder, uint64_t bytes, struct machine_disk *out,
                       struct error *err);

struct machine_memory {
    uint64_t total_bytes;
    uint64_t available_bytes;
    uint64_t cgroup_bytes; /* the tightest limit of the process's cgroups; 0: none */
    uint64_t cgroup_used_bytes;
};
void machine_probe_memory(struct machine_memory *out);
/* What a process started now could take: what is available, within the cgroup's limit. */
uint64_t machine_memory_usable(const struct machine_memory *memory);

struct machine_cpu {
    char model[128];
    uint32_t online;  /* of the machine */
    uint32_t allowed; /* to this process: cpu_count() */
    double quota;     /* of the cgroup, in CPUs; 0: none */
    double load;      /* of the last minute: processes that ran or wanted to */
};
void machine_probe_cpu(struct machine_cpu *out);

#endif
