/* annd doctor: what this machine gives annd, and what keeps it slow. */
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>

#include "index/block_products.h"
#include "index/code_scan.h"
#include "index/distance.h"
#include "index/gemm.h"
#include "storage/base/json_writer.h"
#include "storage/reader.h"
#include "tools/commands.h"
#include "tools/machine_probe.h"

#define REPORT_BYTES_MAX (1u << 20)
#define ADVICE_MAX 16u
#define SLOW_RANDOM_SECONDS 1e-3 /* of a disk with heads, or far away */
#define SLOW_WRITE 50e6
#define FREE_LEAST (1ull << 30)
#define FILES_LEAST 1024u

struct advice {
    bool problem; /* else good to know */
    char text[512];
};

struct checkup {
    struct machine_cpu cpu;
    struct machine_memory memory;
    struct machine_disk disk;
    const char *folder;
    enum reader_backend backend;
    char io_reason[256];
    struct rlimit files, locked;
    bool huge_pages;
    struct advice advice[ADVICE_MAX];
    uint32_t advice_count;
    uint32_t problem_count;
};

__attribute__((format(printf, 3, 4))) static void advise(struct checkup *c, bool problem,
                                                         const char *format, ...)
{
    struct advice *advice = &c->advice[c->advice_count];
    va_list arguments;

    if (c->advice_count == ADVICE_MAX)
        return;
    va_start(arguments, format);
    vsnprintf(advice->text, sizeof advice->text, format, arguments);
    va_end(arguments);
    advice->problem = problem;
    c->advice_count++;
    c->problem_count += problem;
}

static bool huge_pages_given(void)
{
    char line[128] = "";
    FILE *file = fopen("/sys/kernel/mm/transparent_hugepage/enabled", "re");

    if (file) {
        if (!fgets(line, sizeof line, file))
            line[0] = 0;
        fclose(file);
    }
    return !strstr(line, "[never]");
}

/* ---- findings ---- */

static void look_at_kernels(struct checkup *c)
{
    const char *asked = getenv("ANND_ISA"), *used = distance_kernels_best()->name;
    const struct distance_kernels *best = NULL;
    bool avx512 = distance_kernels_for(ISA_AVX512) != NULL;

    for (int isa = ISA_SCALAR; isa < ISA_COUNT; isa++)
        best = distance_kernels_for((enum isa)isa) ? distance_kernels_for((enum isa)isa) : best;
    if (asked && *asked && strcmp(asked, used))
        advise(c, true,
               "ANND_ISA=%s is not known or not there on this machine and was ignored; "
               "unset it",
               asked);
    else if (strcmp(best->name, used))
        advise(c, true, "ANND_ISA=%s keeps the %s kernels away, which this machine has; unset it",
               asked ? asked : "", best->name);
    else if (!distance_kernels_for(ISA_AVX2))
        advise(c, true,
               "this processor has no AVX2: searches and builds take several times as "
               "long as they would with it");
    if (avx512 &&
        (!strcasecmp(gemm_core_name(), "Haswell") || !strcasecmp(gemm_core_name(), "Zen")))
        advise(c, true,
               "OpenBLAS runs its %s kernels on a processor with AVX-512: float builds "
               "take up to twice as long; set OPENBLAS_CORETYPE=SKYLAKEX",
               gemm_core_name());
}

static void look_at_cpu(struct checkup *c)
{
    if (c->cpu.allowed < c->cpu.online)
        advise(c, false, "this process may use %u of the machine's %u processors", c->cpu.allowed,
               c->cpu.online);
    if (c->cpu.quota > 0 && c->cpu.quota < c->cpu.allowed - 0.5)
        advise(c, true,
               "the cgroup grants the time of %.1f processors and %u are there: threads "
               "will wait for each other; use --threads %.0f",
               c->cpu.quota, c->cpu.allowed, c->cpu.quota < 1 ? 1 : c->cpu.quota);
    if (c->cpu.load > c->cpu.allowed)
        advise(c, false,
               "%.1f processes were at work in the last minute: what is measured now is "
               "slower than on an idle machine",
               c->cpu.load);
}

static void look_at_memory(struct checkup *c)
{
    uint64_t usable = machine_memory_usable(&c->memory);

    if (usable < FREE_LEAST)
        advise(c, true,
               "%llu MiB of memory can be had; stop other programs or raise the cgroup's "
               "limit, or plan with --memory",
               (unsigned long long)usable >> 20);
    if (!c->huge_pages)
        advise(c, false,
               "transparent huge pages are off: scans of codes are some percent slower; "
               "echo madvise > /sys/kernel/mm/transparent_hugepage/enabled");
}

static void look_at_disk(struct checkup *c)
{
    const struct machine_disk *disk = &c->disk;

    if (c->backend == READER_PREAD)
        advise(c, true, "io_uring is not used (%s): reads go through threads, which takes more CPU",
               c->io_reason);
    if (!disk->direct)
        advise(c, true,
               "%s cannot be read past the page cache: it is memory, or a file system "
               "without O_DIRECT; keep indexes on a disk's own file system",
               c->folder);
    if (disk->random_seconds > SLOW_RANDOM_SECONDS)
        advise(c, true,
               "a read of 4 KiB from %s takes %.1f ms and a search needs a row of them: "
               "keep indexes on an SSD of this machine",
               c->folder, disk->random_seconds * 1e3);
    if (disk->write_per_second < SLOW_WRITE)
        advise(c, true, "%s takes %.0f MB a second: builds will wait for it", c->folder,
               disk->write_per_second * 1e-6);
    if (disk->free_bytes < FREE_LEAST)
        advise(c, true, "%s has %llu MiB free", c->folder,
               (unsigned long long)disk->free_bytes >> 20);
}

static void look_at_limits(struct checkup *c)
{
    if (c->files.rlim_cur < FILES_LEAST)
        advise(c, true, "%llu files may be open at once, a server needs more: ulimit -n %llu",
               (unsigned long long)c->files.rlim_cur,
               (unsigned long long)(c->files.rlim_max < 65536 ? c->files.rlim_max : 65536));
}

/* ---- the report ---- */

static const char *limit_text(char *out, size_t bytes, rlim_t limit, bool is_bytes)
{
    if (limit == RLIM_INFINITY)
        snprintf(out, bytes, "no limit of");
    else if (is_bytes)
        snprintf(out, bytes, "%llu KiB of", (unsigned long long)limit >> 10);
    else
        snprintf(out, bytes, "%llu", (unsigned long long)limit);
    return out;
}

static void print_table(const struct checkup *c)
{
    const double gib = 1024.0 * 1024 * 1024;
    const struct machine_disk *disk = &c->disk;
    char files[32], locked[32];

    printf("cpu       %s, %u processors of %u, load %.1f\n", c->cpu.model, c->cpu.allowed,
           c->cpu.online, c->cpu.load);
    printf("kernels   distances %s, all pairs %s, codes %s\n", distance_kernels_best()->name,
           block_products_isa(), code_scan_kernels_best()->name);
    printf("openblas  %s, 1 thread inside annd's own", gemm_core_name());
    if (gemm_core_before())
        printf("; chosen by annd, OpenBLAS took %s", gemm_core_before());
    else if (getenv("OPENBLAS_CORETYPE") && *getenv("OPENBLAS_CORETYPE"))
        printf("; chosen by OPENBLAS_CORETYPE=%s", getenv("OPENBLAS_CORETYPE"));
    printf("\nreads     %s%s%s\n", reader_backend_name(c->backend),
           c->backend == READER_PREAD ? ": " : "", c->backend == READER_PREAD ? c->io_reason : "");
    printf("memory    %.1f GiB, %.1f GiB available", (double)c->memory.total_bytes / gib,
           (double)c->memory.available_bytes / gib);
    if (c->memory.cgroup_bytes)
        printf(", cgroup limit %.1f GiB, %.1f GiB in use", (double)c->memory.cgroup_bytes / gib,
               (double)c->memory.cgroup_used_bytes / gib);
    printf(
        "\ndisk      %s: %.1f GiB free, writes %.0f MB/s, reads %.0f MB/s; 4 KiB in %.0f us, %.0f "
        "a second at depth %u\n",
        c->folder, (double)disk->free_bytes / gib, disk->write_per_second * 1e-6,
        disk->read_per_second * 1e-6, disk->random_seconds * 1e6, disk->random_per_second,
        MACHINE_DISK_DEPTH);
    printf("limits    %s open files, %s locked memory\n",
           limit_text(files, sizeof files, c->files.rlim_cur, false),
           limit_text(locked, sizeof locked, c->locked.rlim_cur, true));
    for (uint32_t i = 0; i < c->advice_count; i++)
        printf("%s  %s\n", c->advice[i].problem ? "SLOW    " : "note    ", c->advice[i].text);
    if (!c->problem_count)
        printf("all is well\n");
}

static int print_json(const struct checkup *c, struct error *err)
{
    struct json_writer w;
    const char *text;
    size_t bytes;
    int rc = -1;

    json_writer_init(&w, REPORT_BYTES_MAX);
    json_begin_object(&w);
    json_key(&w, "cpu"), json_string(&w, c->cpu.model);
    json_key(&w, "processors"), json_uint64(&w, c->cpu.allowed);
    json_key(&w, "load"), json_double(&w, c->cpu.load);
    json_key(&w, "kernels"), json_begin_object(&w);
    json_key(&w, "distances"), json_string(&w, distance_kernels_best()->name);
    json_key(&w, "all_pairs"), json_string(&w, block_products_isa());
    json_key(&w, "codes"), json_string(&w, code_scan_kernels_best()->name);
    json_end_object(&w);
    json_key(&w, "openblas"), json_begin_object(&w);
    json_key(&w, "core"), json_string(&w, gemm_core_name());
    json_key(&w, "core_before");
    if (gemm_core_before())
        json_string(&w, gemm_core_before());
    else
        json_null(&w);
    json_key(&w, "threads"), json_uint64(&w, 1);
    json_end_object(&w);
    json_key(&w, "reads"), json_string(&w, reader_backend_name(c->backend));
    json_key(&w, "memory"), json_begin_object(&w);
    json_key(&w, "total_bytes"), json_uint64(&w, c->memory.total_bytes);
    json_key(&w, "available_bytes"), json_uint64(&w, c->memory.available_bytes);
    json_key(&w, "cgroup_bytes");
    if (c->memory.cgroup_bytes)
        json_uint64(&w, c->memory.cgroup_bytes);
    else
        json_null(&w);
    json_end_object(&w);
    json_key(&w, "disk"), json_begin_object(&w);
    json_key(&w, "folder"), json_string(&w, c->folder);
    json_key(&w, "free_bytes"), json_uint64(&w, c->disk.free_bytes);
    json_key(&w, "write_bytes_per_second"), json_double(&w, c->disk.write_per_second);
    json_key(&w, "read_bytes_per_second"), json_double(&w, c->disk.read_per_second);
    json_key(&w, "random_read_seconds"), json_double(&w, c->disk.random_seconds);
    json_key(&w, "random_reads_per_second"), json_double(&w, c->disk.random_per_second);
    json_key(&w, "direct"), json_bool(&w, c->disk.direct);
    json_end_object(&w);
    json_key(&w, "open_files");
    json_uint64(&w, c->files.rlim_cur);
    json_key(&w, "locked_memory_bytes");
    json_uint64(&w, c->locked.rlim_cur);
    for (int problems = 1; problems >= 0; problems--) {
        json_key(&w, problems ? "problems" : "notes"), json_begin_array(&w);
        for (uint32_t i = 0; i < c->advice_count; i++)
            if (c->advice[i].problem == problems)
                json_string(&w, c->advice[i].text);
        json_end_array(&w);
    }
    json_end_object(&w);
    if (json_writer_finish(&w, &text, &bytes, err) == 0) {
        printf("%s\n", text);
        rc = 0;
    }
    json_writer_release(&w);
    return rc;
}

static int run(const struct arguments *arguments, struct error *err)
{
    struct checkup c = {.folder = option_text(arguments, "folder")};

    c.backend = reader_probe(c.io_reason); /* forks: before any thread */
    gemm_init();
    machine_probe_cpu(&c.cpu);
    machine_probe_memory(&c.memory);
    c.huge_pages = huge_pages_given();
    getrlimit(RLIMIT_NOFILE, &c.files);
    getrlimit(RLIMIT_MEMLOCK, &c.locked);
    if (machine_probe_disk(c.folder, MACHINE_DISK_BYTES, &c.disk, err) < 0)
        return -1;
    look_at_cpu(&c);
    look_at_kernels(&c);
    look_at_memory(&c);
    look_at_disk(&c);
    look_at_limits(&c);
    if (!strcmp(option_text(arguments, "output"), "json")) {
        if (print_json(&c, err) < 0)
            return -1;
    } else {
        print_table(&c);
    }
    return c.problem_count ? EXIT_FAILED : EXIT_DONE;
}

static const struct option options[] = {
    {"folder", OPTION_TEXT, "DIR", ".", NULL, "folder whose disk is measured", 0, 0},
    {"output", OPTION_TEXT, "FORM", "table", "table|json", "form of the report", 0, 0},
    {0},
};

const struct command command_doctor = {
    .name = "doctor",
    .positional = "",
    .summary = "look at this machine: what annd runs on, and what keeps it slow",
    .examples = "  annd doctor\n"
                "  annd doctor --folder /data --output json\n",
    .options = options,
    .run = run,
};
