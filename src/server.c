/* Start: limits of the process, probe of io_uring (it needs a process without threads), signals
 * blocked so that all threads inherit that, service, HTTP; then the main thread alone receives
 * signals. Stop is the reverse, with a drain in front. */
#include "src/server.h"

#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <unistd.h>

#include "index/distance.h"
#include "src/api.h"
#include "src/http.h"
#include "src/log.h"
#include "src/service.h"
#include "storage/base/pool.h"

#ifndef ANND_VERSION
#define ANND_VERSION "0.1.0"
#endif

#define DRAIN_MS 30000u
#define CONNECTION_MAX 512u
#define CONNECTION_PER_IP_MAX 64u
#define OTHER_FILES 512u /* segments, rings, the catalogue */
#define BODY_MEMORY_MIN ((uint64_t)2 * HTTP_BODY_BYTES_MAX)
#define EXIT_AT_ONCE 75 /* the front door's code for "interrupted" */

static volatile sig_atomic_t stop_signals;

static void on_stop(int number)
{
    (void)number;
    if (stop_signals > 0)
        _exit(EXIT_AT_ONCE); /* nothing is written here: stopping hard loses nothing */
    stop_signals = 1;
}

static int signals_install(struct error *err)
{
    struct sigaction action;

    memset(&action, 0, sizeof action);
    sigemptyset(&action.sa_mask);
    action.sa_handler = SIG_IGN;
    if (sigaction(SIGPIPE, &action, NULL) < 0)
        return error_set_errno(err, errno, "sigaction");
    action.sa_handler = on_stop;
    if (sigaction(SIGTERM, &action, NULL) < 0 || sigaction(SIGINT, &action, NULL) < 0)
        return error_set_errno(err, errno, "sigaction");
    return 0;
}

/* Vectors are somebody's data: a crash leaves no copy of them in a core file. */
static void limits_set(void)
{
    const struct rlimit no_core = {0, 0};
    struct rlimit files;

    setrlimit(RLIMIT_CORE, &no_core);
    if (getrlimit(RLIMIT_NOFILE, &files) < 0)
        return;
    if (files.rlim_cur < files.rlim_max) {
        files.rlim_cur = files.rlim_max > 65536 ? 65536 : files.rlim_max;
        setrlimit(RLIMIT_NOFILE, &files);
    }
    if (files.rlim_cur < CONNECTION_MAX + OTHER_FILES)
        log_warning("only %llu file descriptors are allowed, %u connections and the index's files "
                    "may need %u",
                    (unsigned long long)files.rlim_cur, CONNECTION_MAX,
                    CONNECTION_MAX + OTHER_FILES);
}

static int check_address(const char *option, const char *text, bool insecure, struct error *err)
{
    char host[64];
    uint16_t port;
    bool loopback;

    if (http_parse_address(text, host, sizeof host, &port, &loopback, err) < 0)
        return error_prefix(err, "%s", option);
    if (loopback || insecure)
        return 0;
    error_set(err, ERR_INVALID,
              "%s %s can be reached from other machines, and this server has neither passwords nor "
              "TLS",
              option, text);
    return (error_remedy(err, "listen on 127.0.0.1, or add --insecure if the network keeps "
                              "strangers out"),
            -1);
}

/* "ADDR:9091" for the ADDR of `listen`. */
static void metrics_address(const char *listen, char *out, size_t out_bytes)
{
    const char *colon = strrchr(listen, ':');

    snprintf(out, out_bytes, "%.*s:%u", (int)(colon ? colon - listen : 0), listen,
             SERVER_METRICS_PORT_DEFAULT);
}

static void say_started(const struct server_options *options, const struct service *service,
                        const struct http_server *http, const char *probe_reason)
{
    const char *metrics = http_server_metrics_address(http);
    uint64_t rows = 0;
    char damaged[64] = "";

    for (uint32_t i = 0; i < service->collection_count; i++)
        rows += service->collections[i].index ? service->collections[i].index->row_count : 0;
    if (service->damaged_count > 0)
        snprintf(damaged, sizeof damaged, " (%u damaged)", service->damaged_count);
    log_info(
        "annd %s serves %s on http://%s%s%s: io %s%s%s%s, kernels %s, %u search threads for %s, "
        "%u collections%s, %llu rows, %llu of %llu MiB memory",
        ANND_VERSION, options->data, http_server_address(http), metrics ? ", metrics on " : "",
        metrics ? metrics : "", reader_backend_name(service->backend), probe_reason[0] ? " (" : "",
        probe_reason, probe_reason[0] ? ")" : "", distance_kernels_best()->name,
        search_engine_threads(service->engine), options->prefer_latency ? "latency" : "throughput",
        service->collection_count, damaged, (unsigned long long)rows,
        (unsigned long long)(service->memory_used >> 20),
        (unsigned long long)(service->memory_bytes >> 20));
}

int server_run(const struct server_options *options, struct error *err)
{
    const char *listen = options->listen ? options->listen : SERVER_LISTEN_DEFAULT;
    const char *metrics = options->metrics_listen;
    const struct service_options service_options = {
        .data = options->data,
        .memory_bytes = options->memory_bytes,
        .threads = options->threads,
        .prefer_latency = options->prefer_latency,
        .backend = options->backend,
    };
    char metrics_default[80];
    char probe_reason[256] = "";
    struct service *service = NULL;
    struct http_server *http = NULL;
    sigset_t stopping;
    sigset_t before;
    sigset_t waiting;
    uint32_t left;
    int rc = -1;

    if (!metrics) {
        metrics_address(listen, metrics_default, sizeof metrics_default);
        metrics = metrics_default;
    }
    if (strcmp(metrics, "off") == 0)
        metrics = NULL;
    if (check_address("--listen", listen, options->insecure, err) < 0 ||
        (metrics && check_address("--metrics-listen", metrics, options->insecure, err) < 0) ||
        signals_install(err) < 0)
        return -1;
    limits_set();
    sigemptyset(&stopping);
    sigaddset(&stopping, SIGTERM);
    sigaddset(&stopping, SIGINT);
    sigprocmask(SIG_BLOCK, &stopping, &before);
    if (options->backend == READER_AUTO)
        reader_probe(probe_reason);

    if (service_open(&service_options, &service, err) < 0)
        goto done;
    {
        uint64_t body_memory = service->memory_bytes / 4;
        uint32_t threads = cpu_count();
        const struct http_options http_options = {
            .listen = listen,
            .metrics_listen = metrics,
            .threads = threads > 4 ? 4 : threads,
            .connection_max = CONNECTION_MAX,
            .connection_per_ip_max = CONNECTION_PER_IP_MAX,
            .body_memory_max = body_memory > BODY_MEMORY_MIN ? body_memory : BODY_MEMORY_MIN,
            .routes = api_routes,
            .route_count = api_route_count,
            .context = service,
        };

        if (http_server_start(&http_options, &http, err) < 0)
            goto done;
    }
    say_started(options, service, http, probe_reason);
    waiting = before;
    sigdelset(&waiting, SIGTERM);
    sigdelset(&waiting, SIGINT);
    while (stop_signals == 0)
        sigsuspend(&waiting);

    log_info("stopping: answering what is under way, for up to %u s", DRAIN_MS / 1000);
    /* From here a second signal may come at any time. */
    sigprocmask(SIG_UNBLOCK, &stopping, NULL);
    left = http_server_drain(http, DRAIN_MS);
    if (left > 0)
        log_warning("%u requests were cut off", left);
    rc = 0;
done:
    http_server_stop(http);
    service_close(service);
    sigprocmask(SIG_SETMASK, &before, NULL);
    if (rc == 0)
        log_info("stopped");
    return rc;
}
