/* Opening: the data directory (its lock keeps a second server out), then every collection, then the
 * search engine, sized for the largest of them.
 *
 * Memory: an eighth of the budget, within bounds, is set aside for the engine's scratch; the
 * indexes share the rest. One collection gets it all. Several are opened with the least they need
 * first, and then once more with a share of what is left by their rows. */
#include "src/service.h"

#include <errno.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "src/http.h"
#include "src/log.h"
#include "src/request.h"
#include "storage/base/pool.h"
#include "storage/data_directory.h"

#define MEBIBYTE (UINT64_C(1) << 20)
#define ENGINE_BYTES_MIN (8 * MEBIBYTE)
#define ENGINE_BYTES_MAX (256 * MEBIBYTE)
#define SLOTS_MAX 16u
/* Outstanding over all threads, and of a query: the drive answers soonest when few wait, and most
 * when many do; a query of more reads at a time waits less often and wastes some of them. */
#define THROUGHPUT_READS_IN_FLIGHT 128u
#define LATENCY_READS_IN_FLIGHT 32u
#define LATENCY_BEAM_WIDTH 4u
#define READER_DEPTH 128u
#define WORKER_THREADS 2u
#define WORKER_QUEUE_MAX 1024u

/* One per thread, for fetching rows. */
static pthread_key_t reader_key;
static pthread_once_t reader_key_once = PTHREAD_ONCE_INIT;
static int reader_key_error;

static void reader_key_close(void *reader)
{
    reader_close(reader);
}

static void reader_key_make(void)
{
    reader_key_error = pthread_key_create(&reader_key, reader_key_close);
}

int service_reader(const struct service *service, struct reader **out, struct error *err)
{
    struct reader *reader;

    pthread_once(&reader_key_once, reader_key_make);
    if (reader_key_error != 0)
        return error_set_errno(err, reader_key_error, "a thread's reader");
    reader = pthread_getspecific(reader_key);
    if (!reader) {
        int code;

        if (reader_open(service->backend, READER_DEPTH, &reader, err) < 0)
            return -1;
        code = pthread_setspecific(reader_key, reader);
        if (code != 0) {
            reader_close(reader);
            return error_set_errno(err, code, "a thread's reader");
        }
    }
    *out = reader;
    return 0;
}

/* First number in a small file of the kernel's, after `label`; 0 when there is none. */
static uint64_t kernel_number(const char *path, const char *label)
{
    char line[256];
    unsigned long long value = 0;
    FILE *file = fopen(path, "re");

    if (!file)
        return 0;
    while (fgets(line, sizeof line, file)) {
        if (strncmp(line, label, strlen(label)) == 0 &&
            sscanf(line + strlen(label), "%llu", &value) == 1)
            break;
    }
    fclose(file);
    return value;
}

static uint64_t memory_default(void)
{
    uint64_t bytes = kernel_number("/proc/meminfo", "MemAvailable:") * 1024;
    uint64_t limit = kernel_number("/sys/fs/cgroup/memory.max", "");

    if (limit > 0 && limit < bytes)
        bytes = limit;
    return bytes > 0 ? bytes / 2 : 1024 * MEBIBYTE;
}

/* Opens one collection, or notes why it cannot be. Fails only where all must. */
static int collection_open(struct service *service, struct collection *collection,
                           uint64_t memory_bytes, struct error *err)
{
    char path[FILE_PATH_MAX];
    struct error why = ERROR_INIT;

    if (collection->damage)
        return 0;
    index_directory_close(collection->index);
    collection->index = NULL;
    if (data_directory_collection_path(service->data, collection->id, path, err) < 0)
        return -1;
    if (index_directory_open(vfs_posix(), path, memory_bytes, true, &collection->index, &why) == 0)
        return 0;
    if (why.code == ERR_BUDGET || why.code == ERR_NOMEM) {
        *err = why;
        return error_prefix(err, "collection %s", collection->name);
    }
    collection->damage = strndup(why.message, strcspn(why.message, "\n"));
    if (!collection->damage)
        return error_set(err, ERR_NOMEM, "no memory to open collections");
    service->damaged_count++;
    log_error("collection %s is not served: %s", collection->name, collection->damage);
    return 0;
}

static int open_collections(struct service *service, uint64_t budget, struct error *err)
{
    uint64_t least = 0;
    uint64_t rows = 0;
    uint64_t spare;

    if (service->collection_count == 1)
        return collection_open(service, &service->collections[0], budget, err);
    for (uint32_t i = 0; i < service->collection_count; i++) {
        struct collection *collection = &service->collections[i];

        if (collection_open(service, collection, 0, err) < 0)
            return -1;
        if (collection->index) {
            least += collection->index->memory_bytes;
            rows += collection->index->row_count;
        }
    }
    if (least > budget) {
        error_set(err, ERR_BUDGET,
                  "%u collections need %llu MiB of memory for codes and tables, the budget leaves "
                  "%llu MiB",
                  service->collection_count, (unsigned long long)(least / MEBIBYTE + 1),
                  (unsigned long long)(budget / MEBIBYTE));
        error_remedy(err, "grant more with --memory, or serve fewer collections");
        return -1;
    }
    spare = budget - least;
    for (uint32_t i = 0; i < service->collection_count; i++) {
        struct collection *collection = &service->collections[i];
        uint64_t share;

        if (!collection->index || collection->index->row_count == 0)
            continue;
        share = (uint64_t)((double)spare * (double)collection->index->row_count / (double)rows);
        if (share >= MEBIBYTE &&
            collection_open(service, collection, collection->index->memory_bytes + share, err) < 0)
            return -1;
    }
    return 0;
}

/* As many queries at a time as the memory that is left allows. */
static int open_engine(struct service *service, const struct service_options *options,
                       struct error *err)
{
    struct search_engine_options wanted = {
        .threads = options->threads ? options->threads : cpu_count(),
        .slots_per_thread = SLOTS_MAX,
        .reads_in_flight =
            options->prefer_latency ? LATENCY_READS_IN_FLIGHT : THROUGHPUT_READS_IN_FLIGHT,
        .limits =
            {
                .search_list_max = SEARCH_LIST_MAX,
                .cells_max = DISK_SEARCH_CELLS_MAX,
                .k_max = REQUEST_WINDOW_MAX,
                .beam_width = REQUEST_BEAM_WIDTH_MAX,
            },
        .backend = options->backend,
    };
    uint64_t left = service->memory_bytes - service->memory_used;
    uint64_t slot_bytes, scratch_bytes;

    for (uint32_t i = 0; i < service->collection_count; i++) {
        const struct index_directory *index = service->collections[i].index;

        for (uint32_t s = 0; index && s < index->segment_count; s++) {
            for (uint32_t f = 0; f < index->segments[s].field_count; f++)
                disk_search_limits_raise(&wanted.limits, index->segments[s].fields[f]);
        }
    }
    /* A directory without a sound collection is served too. */
    if (wanted.limits.dim_max == 0) {
        wanted.limits.dim_max = 1;
        wanted.limits.buffer_bytes_max = FILE_BLOCK_BYTES;
    }
    slot_bytes = disk_search_memory_bytes(&wanted.limits);
    scratch_bytes = walk_scratch_memory_bytes(&wanted.limits);
    if (left > ENGINE_BYTES_MAX)
        left = ENGINE_BYTES_MAX;
    while (wanted.slots_per_thread > 1 &&
           wanted.threads * (wanted.slots_per_thread * slot_bytes + scratch_bytes) > left)
        wanted.slots_per_thread /= 2;
    while (wanted.threads > 1 && wanted.threads * (slot_bytes + scratch_bytes) > left)
        wanted.threads--;
    if (slot_bytes + scratch_bytes > left) {
        error_set(err, ERR_BUDGET,
                  "one search takes %llu KiB of scratch, %llu KiB are left of the %llu MiB granted",
                  (unsigned long long)((slot_bytes + scratch_bytes) / 1024),
                  (unsigned long long)(left / 1024),
                  (unsigned long long)(service->memory_bytes / MEBIBYTE));
        error_remedy(err, "grant more with --memory");
        return -1;
    }
    if (search_engine_open(&wanted, &service->engine, err) < 0)
        return -1;
    service->memory_used += search_engine_memory_bytes(service->engine);
    service->backend = search_engine_backend(service->engine);
    service->early_reads = options->prefer_latency;
    service->beam_width = options->prefer_latency ? LATENCY_BEAM_WIDTH : REQUEST_BEAM_WIDTH_DEFAULT;
    return 0;
}

static int compare_names(const void *left, const void *right)
{
    const struct service_name *a = left;
    const struct service_name *b = right;
    int order = strcmp(a->database, b->database);

    return order != 0 ? order : strcmp(a->name, b->name);
}

static int list_collections(struct service *service, struct error *err)
{
    uint32_t count = data_directory_count(service->data);
    uint32_t names = 0;

    for (uint32_t i = 0; i < count; i++)
        names += 1 + data_directory_at(service->data, i)->alias_count;
    service->collections = calloc(count ? count : 1, sizeof *service->collections);
    service->names = calloc(names ? names : 1, sizeof *service->names);
    if (!service->collections || !service->names)
        return error_set(err, ERR_NOMEM, "no memory for %u collections", count);
    service->collection_count = count;
    for (uint32_t i = 0; i < count; i++) {
        const struct data_collection *entry = data_directory_at(service->data, i);
        struct collection *collection = &service->collections[i];

        collection->id = entry->number;
        collection->name = entry->name;
        collection->database =
            entry->database && *entry->database ? entry->database : DATA_DATABASE_DEFAULT;
        collection->description = entry->description ? entry->description : "";
        collection->aliases = entry->aliases;
        collection->alias_count = entry->alias_count;
        service->names[service->name_count++] =
            (struct service_name){collection->database, collection->name, collection};
        for (uint32_t a = 0; a < entry->alias_count; a++)
            service->names[service->name_count++] =
                (struct service_name){collection->database, entry->aliases[a], collection};
    }
    qsort(service->names, service->name_count, sizeof *service->names, compare_names);
    return 0;
}

int service_open(const struct service_options *options, struct service **out, struct error *err)
{
    struct service *service = calloc(1, sizeof *service);
    uint64_t engine_bytes;
    int rc = -1;

    if (!service)
        return error_set(err, ERR_NOMEM, "no memory for the service");
    service->started_us = http_now_us();
    service->memory_bytes = options->memory_bytes ? options->memory_bytes : memory_default();
    engine_bytes = service->memory_bytes / 8;
    if (engine_bytes < ENGINE_BYTES_MIN)
        engine_bytes = ENGINE_BYTES_MIN;
    if (engine_bytes > ENGINE_BYTES_MAX)
        engine_bytes = ENGINE_BYTES_MAX;
    if (engine_bytes >= service->memory_bytes) {
        error_set(err, ERR_BUDGET,
                  "%llu KiB of memory are too few to serve from: at least %llu "
                  "MiB and what the collections need",
                  (unsigned long long)(service->memory_bytes / 1024),
                  (unsigned long long)(ENGINE_BYTES_MIN / MEBIBYTE));
        goto done;
    }
    if (data_directory_open(vfs_posix(), options->data, false, &service->data, err) < 0)
        goto done;
    for (uint32_t i = 0; i < data_directory_warning_count(service->data); i++)
        log_warning("%s", data_directory_warning(service->data, i));
    if (list_collections(service, err) < 0 ||
        open_collections(service, service->memory_bytes - engine_bytes, err) < 0)
        goto done;
    for (uint32_t i = 0; i < service->collection_count; i++) {
        if (service->collections[i].index)
            service->memory_used += service->collections[i].index->memory_bytes;
    }
    if (open_engine(service, options, err) < 0 ||
        worker_pool_open(WORKER_THREADS, WORKER_QUEUE_MAX, &service->workers, err) < 0)
        goto done;
    *out = service;
    service = NULL; /* moved to the caller */
    rc = 0;
done:
    service_close(service);
    return rc;
}

void service_close(struct service *service)
{
    if (!service)
        return;
    worker_pool_close(service->workers);
    search_engine_close(service->engine);
    for (uint32_t i = 0; i < service->collection_count; i++) {
        index_directory_close(service->collections[i].index);
        free(service->collections[i].damage);
    }
    free(service->collections);
    free(service->names);
    data_directory_close(service->data);
    free(service);
}

struct collection *service_find(const struct service *service, const char *database,
                                const char *name)
{
    const struct service_name wanted = {.database = database, .name = name};
    const struct service_name *found =
        bsearch(&wanted, service->names, service->name_count, sizeof wanted, compare_names);

    return found ? found->collection : NULL;
}

bool service_has_database(const struct service *service, const char *database)
{
    if (strcmp(database, DATA_DATABASE_DEFAULT) == 0)
        return true;
    for (uint32_t i = 0; i < service->name_count; i++) {
        if (strcmp(service->names[i].database, database) == 0)
            return true;
    }
    return false;
}
