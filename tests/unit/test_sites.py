"""Site files are read strictly, and settings refuse what can't be."""

from __future__ import annotations

from pathlib import Path

import pytest

from forja import recipes
from forja.errors import BadInput
from forja.recipes.base import STAGES
from forja.settings import Settings
from forja.sites import SITES, load_site

GOOD = '[pools]\ncpu = 1\n[profiles.p]\nrunner = "local"\nenvironment = "ml"\n'
ALLOW = (
    GOOD + '[baseline]\nprobe_image = "x:1"\n[[baseline.allow]]\nname = "kafka"\naddress = "k:9092"\nport = 9092\ncidr = "10.1.2.0/24"\n'
)

GATEWAY = GOOD + '[gateway]\nname = "m"\nnamespace = "g"\nimage = "x:1"\nfetch_image = "x:1"\n'

BAD = {
    "unknown key": (GOOD + "gpu = 1\n", r"profiles\.p\.gpu"),
    "unknown table": (GOOD + "[profile.q]\n", "unknown key: got 'profile'"),
    "no TOML": ("[pools\n", "no valid TOML"),
    "pool that isn't there": (GOOD.replace("cpu = 1", "gpu = 1"), r"profiles\.p\.pool"),
    "negative cpus": (GOOD + "cpus = -1\n", "field cpus"),
    "GPUs and a slice": (GOOD + 'gpus = 1\nmig = "1g.10gb"\n', "field mig"),
    "a gang of processes": (GOOD + "nodes = 2\n", "field nodes"),
    "no gang at all": (GOOD + "nodes = 0\n", "field nodes"),
    "a tenant's name": (GOOD + '[tenants.Vision]\nnamespace = "x"\n', "tenant Vision: field team"),
    "a tenant's negative quota": (GOOD + '[tenants.vision]\nnamespace = "x"\nmig = {"1g.10gb" = -1}\n', r"field mig\.1g\.10gb"),
    "a tenant's unknown key": (GOOD + '[tenants.vision]\nnamespace = "x"\ngpu = 1\n', r"tenants\.vision\.gpu"),
    "a gateway's unknown key": (GOOD + "[gateway]\nport = 80\n", r"gateway\.port"),
    "a baseline's unknown key": (GOOD + '[baseline]\nprobe_image = "x:1"\ndeny = []\n', r"baseline\.deny"),
    "a baseline without an image": (GOOD + "[baseline]\n", "probe_image"),
    "a probe namespace that is none": (GOOD + '[baseline]\nprobe_image = "x:1"\nprobe_namespace = "A"\n', "field probe_namespace"),
    "an allowed thing's unknown key": (ALLOW + "ports = [1]\n", r"baseline\.allow\.ports"),
    "an allowed thing without an address": (ALLOW.replace("address", "#"), "address"),
    "an allowed thing's address without a port": (ALLOW.replace("k:9092", "k"), "field address"),
    "an allowed thing's port": (ALLOW.replace("port = 9092", "port = 0"), "field port"),
    "an allowed thing nowhere": (ALLOW.replace("cidr", "#"), "field cidr"),
    "an allowed thing in two places": (ALLOW + 'namespace = "forja"\n', "field cidr"),
    "everything allowed": (ALLOW.replace("10.1.2.0/24", "0.0.0.0/0"), "field cidr"),
    "a range with host bits": (ALLOW.replace("10.1.2.0/24", "10.1.2.1/24"), "field cidr"),
    "the cloud's metadata": (ALLOW.replace("10.1.2.0/24", "169.254.0.0/16"), "field cidr"),
    "the cloud's metadata by its other address": (ALLOW.replace("10.1.2.0/24", "fd00:ec2::/32"), "field cidr"),
    "a quarter of everything": (ALLOW.replace("10.1.2.0/24", "64.0.0.0/2"), "field cidr"),
    "all public addresses": (ALLOW.replace("10.1.2.0/24", "2000::/3"), "field cidr"),
    "a stage that there is none of": (ALLOW + 'stage = "releas"\n', "field stage"),
    "a port in words": (ALLOW.replace("port = 9092", 'port = "9092"'), r"baseline\.allow\.port: got '9092'; allowed: a whole number"),
    "a port that is true": (ALLOW.replace("port = 9092", "port = true"), r"baseline\.allow\.port"),
    "one allowed thing instead of a list": (GOOD + '[baseline]\nprobe_image = "x:1"\nallow = 1\n', r"baseline\.allow: got 1"),
    "a tenant without a namespace": (GOOD + "[tenants.vision]\ngpus = 1\n", "tenants.vision: .*namespace"),
    "a tenant that is a word": (GOOD + '[tenants]\nvision = "x"\n', "tenants.vision: got 'x'"),
    "a tenant's GPUs in words": (GOOD + '[tenants.vision]\nnamespace = "x"\ngpus = "4"\n', r"tenants\.vision\.gpus: got '4'"),
    "half a slice": (GOOD + '[tenants.vision]\nnamespace = "x"\nmig = {"1g.10gb" = 0.5}\n', r"tenants\.vision\.mig"),
    "a gateway without an image": (GOOD + '[gateway]\nname = "m"\nnamespace = "g"\n', "table gateway: .*image"),
    "a gateway's namespace that is none": (GATEWAY.replace('"g"', '"G"'), "gateway: field namespace"),
    "replicas in words": (GATEWAY + 'replicas = "2"\n', r"gateway\.replicas"),
    "a profile without a runner": (GOOD.replace("runner", "#"), "profiles.p: .*runner"),
    "cpus in words": (GOOD + 'cpus = "2"\n', r"profiles\.p\.cpus"),
    "a pool in words": (GOOD.replace("cpu = 1", 'cpu = "1"'), r"pools\.cpu"),
    "another vendor's resource": (GOOD + '[baseline]\nprobe_image = "x:1"\nresources = {"cpu" = 1}\n', "field resources"),
    "whole GPUs for everybody": (GOOD + '[baseline]\nprobe_image = "x:1"\nresources = {"nvidia.com/gpu" = 1}\n', "field resources"),
    "a negative resource": (GOOD + '[baseline]\nprobe_image = "x:1"\nresources = {"nvidia.com/gpu.shared" = -1}\n', "field resources"),
    "an ignored resource that is none": (GOOD + '[baseline]\nprobe_image = "x:1"\nignore = ["hostdev"]\n', "field ignore"),
    "an ignored resource that has a limit": (
        GOOD + '[baseline]\nprobe_image = "x:1"\nresources = {"nvidia.com/x" = 0}\nignore = ["nvidia.com/x"]\n',
        "field ignore",
    ),
    "labels without a namespace": (ALLOW + 'pods = { app = "k" }\n', "field pods"),
    "one name for two allowed things": (ALLOW + ALLOW.partition("\n[[")[2].join(["[[", ""]), "each name once"),
    "a pod without an image": (GOOD.replace('"local"', '"kubernetes"'), "field image"),
    "a pod with the latest image": (GOOD.replace('"local"', '"kubernetes"') + 'image = "x:latest"\n', "field image"),
}


@pytest.mark.parametrize("case", BAD, ids=str)
def test_bad_site_files_are_refused(case: str, tmp_path: Path) -> None:
    text, message = BAD[case]
    (tmp_path / "x.toml").write_text(text)
    with pytest.raises(BadInput, match=message):
        load_site("x", tmp_path)


def test_resources_of_other_names_are_the_baselines(tmp_path: Path) -> None:
    more = 'resources = {"nvidia.com/gpu.shared" = 0}\nignore = ["nvidia.com/hostdev"]\n'
    (tmp_path / "x.toml").write_text(ALLOW.replace("[[", more + "[["))
    found = load_site("x", tmp_path).baseline
    assert found is not None
    assert (found.resources, found.ignore) == ({"nvidia.com/gpu.shared": 0}, ("nvidia.com/hostdev",))


def test_unknown_site_names_the_known_ones() -> None:
    with pytest.raises(BadInput, match=r"cluster, .*local"):
        load_site("mars")


@pytest.mark.parametrize("site", [p.stem for p in SITES.glob("*.toml")])
@pytest.mark.parametrize("recipe", recipes.names())
def test_every_recipe_runs_at_every_site(site: str, recipe: str) -> None:
    loaded, place = recipes.load(recipe), load_site(site)
    for verb in STAGES:
        assert place.profile(getattr(loaded.profiles, verb)).slots <= place.pools[place.profile(getattr(loaded.profiles, verb)).pool]


@pytest.mark.parametrize(
    ("env", "message"),
    [
        ({"FORJA_PORT_KAFKA": "80"}, "FORJA_PORT_KAFKA"),
        ({"FORJA_PORT_KAFKA": "kafka"}, "FORJA_PORT_KAFKA"),
        ({"FORJA_PORT_KAFKA": "15000"}, "a port of its own"),
    ],
)
def test_bad_ports_are_refused(env: dict[str, str], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        Settings.from_env(env)
