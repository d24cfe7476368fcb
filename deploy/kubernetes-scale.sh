#!/bin/sh
# What `tinsmith admin workers scale` runs where Kubernetes starts the workers, from wherever kubectl works:
#   TINSMITH_SCALE_COMMAND="deploy/kubernetes-scale.sh {pool} {count}"
# Which namespace and cluster: kubectl's own context. A pool that KEDA scales goes back to what KEDA says.
set -eu
label="app.kubernetes.io/name=tinsmith,tinsmith/base-model=$(printf %s "$1" | tr / _)"
found=$(kubectl get deployments --selector "$label" --output name)
[ -n "$found" ] || {
    echo "no pool in this namespace has the base model $1" >&2
    exit 1
}
# Two pools of one base model (spot and not) are told apart by name, not here.
[ "$(printf '%s\n' "$found" | wc -l)" -eq 1 ] || {
    echo "several pools have the base model $1: scale one of them by kubectl scale: $(echo $found)" >&2
    exit 1
}
kubectl scale "$found" --replicas "$2"
