"""Kubernetes: manifests for KubeRay, the image, and the tools that write and check them."""
