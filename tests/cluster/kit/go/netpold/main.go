// netpold: a small NetworkPolicy (networking.k8s.io/v1) enforcer for ONE node whose pods are
// routed (CNI "ptp"). It watches pods, namespaces and network policies and programs one nftables
// table, replaced atomically on each change. IPv4 only. Enforces at the forward hook (pod to pod,
// pod to outside) and, for egress, at the input hook (pod to node).  Node to pod is never blocked.
package main

import (
	"bytes"
	"context"
	"flag"
	"fmt"
	"log"
	"os/exec"
	"sort"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	netv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/util/intstr"
	"k8s.io/client-go/informers"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/cache"
	"k8s.io/client-go/tools/clientcmd"
)

type state struct {
	pods []*corev1.Pod
	ns   map[string]*corev1.Namespace
	nps  []*netv1.NetworkPolicy
}

func sel(s *metav1.LabelSelector) labels.Selector {
	r, err := metav1.LabelSelectorAsSelector(s)
	if err != nil {
		return labels.Nothing()
	}
	return r
}

func live(p *corev1.Pod) bool {
	return p.Status.PodIP != "" && !p.Spec.HostNetwork && p.Status.Phase != corev1.PodSucceeded && p.Status.Phase != corev1.PodFailed
}

// peerPods: the pods a podSelector/namespaceSelector peer names, seen from namespace ns.
func (s *state) peerPods(ns string, p netv1.NetworkPolicyPeer) []*corev1.Pod {
	var out []*corev1.Pod
	for _, pod := range s.pods {
		if p.NamespaceSelector == nil {
			if pod.Namespace != ns {
				continue
			}
		} else {
			n := s.ns[pod.Namespace]
			if n == nil || !sel(p.NamespaceSelector).Matches(labels.Set(n.Labels)) {
				continue
			}
		}
		if p.PodSelector != nil && !sel(p.PodSelector).Matches(labels.Set(pod.Labels)) {
			continue
		}
		out = append(out, pod)
	}
	return out
}

func namedPort(pod *corev1.Pod, name string, proto corev1.Protocol) (int32, bool) {
	for _, c := range pod.Spec.Containers {
		for _, p := range c.Ports {
			pp := p.Protocol
			if pp == "" {
				pp = corev1.ProtocolTCP
			}
			if p.Name == name && pp == proto {
				return p.ContainerPort, true
			}
		}
	}
	return 0, false
}

// portMatches returns nft match fragments; dst is the destination pod where one is known.
func portMatches(ports []netv1.NetworkPolicyPort, dst *corev1.Pod) []string {
	if len(ports) == 0 {
		return []string{""}
	}
	var out []string
	for _, p := range ports {
		proto := corev1.ProtocolTCP
		if p.Protocol != nil {
			proto = *p.Protocol
		}
		l := strings.ToLower(string(proto))
		switch {
		case p.Port == nil:
			out = append(out, "meta l4proto "+l)
		case p.Port.Type == intstr.String:
			if dst == nil {
				continue
			}
			if n, ok := namedPort(dst, p.Port.StrVal, proto); ok {
				out = append(out, fmt.Sprintf("%s dport %d", l, n))
			}
		case p.EndPort != nil:
			out = append(out, fmt.Sprintf("%s dport %d-%d", l, p.Port.IntVal, *p.EndPort))
		default:
			out = append(out, fmt.Sprintf("%s dport %d", l, p.Port.IntVal))
		}
	}
	return out
}

func named(ports []netv1.NetworkPolicyPort) bool {
	for _, p := range ports {
		if p.Port != nil && p.Port.Type == intstr.String {
			return true
		}
	}
	return false
}

// allow writes the "return" rules of one policy rule. field is "saddr" (ingress) or "daddr" (egress);
// dst is the protected pod for ingress, nil for egress.
func (s *state) allow(w *bytes.Buffer, ns, field string, peers []netv1.NetworkPolicyPeer, ports []netv1.NetworkPolicyPort, dst *corev1.Pod) {
	if len(peers) == 0 {
		if dst == nil && named(ports) { // egress to anywhere on a named port: every pod that has it
			for _, p := range s.pods {
				for _, m := range portMatches(ports, p) {
					fmt.Fprintf(w, "  ip daddr %s %s return\n", p.Status.PodIP, m)
				}
			}
			return
		}
		for _, m := range portMatches(ports, dst) {
			fmt.Fprintf(w, "  %s return\n", m)
		}
		return
	}
	for _, peer := range peers {
		if b := peer.IPBlock; b != nil {
			ex := ""
			if len(b.Except) > 0 {
				ex = fmt.Sprintf(" ip %s != { %s }", field, strings.Join(b.Except, ", "))
			}
			for _, m := range portMatches(ports, dst) {
				fmt.Fprintf(w, "  ip %s %s%s %s return\n", field, b.CIDR, ex, m)
			}
			continue
		}
		pp := s.peerPods(ns, peer)
		if dst == nil && named(ports) {
			for _, p := range pp {
				for _, m := range portMatches(ports, p) {
					fmt.Fprintf(w, "  ip daddr %s %s return\n", p.Status.PodIP, m)
				}
			}
			continue
		}
		var ips []string
		for _, p := range pp {
			ips = append(ips, p.Status.PodIP)
		}
		if len(ips) == 0 {
			continue
		}
		sort.Strings(ips)
		for _, m := range portMatches(ports, dst) {
			fmt.Fprintf(w, "  ip %s { %s } %s return\n", field, strings.Join(ips, ", "), m)
		}
	}
}

func (s *state) ruleset(node string) string {
	var chains, fwd, inp bytes.Buffer
	sort.Slice(s.nps, func(i, j int) bool {
		return s.nps[i].Namespace+"/"+s.nps[i].Name < s.nps[j].Namespace+"/"+s.nps[j].Name
	})
	sort.Slice(s.pods, func(i, j int) bool { return s.pods[i].UID < s.pods[j].UID })
	for _, pod := range s.pods {
		if pod.Spec.NodeName != node {
			continue
		}
		var in, eg bytes.Buffer
		isoIn, isoEg := false, false
		for _, np := range s.nps {
			if np.Namespace != pod.Namespace || !sel(&np.Spec.PodSelector).Matches(labels.Set(pod.Labels)) {
				continue
			}
			types := np.Spec.PolicyTypes
			if len(types) == 0 {
				types = []netv1.PolicyType{netv1.PolicyTypeIngress}
				if len(np.Spec.Egress) > 0 {
					types = append(types, netv1.PolicyTypeEgress)
				}
			}
			for _, t := range types {
				if t == netv1.PolicyTypeIngress {
					isoIn = true
					for _, r := range np.Spec.Ingress {
						s.allow(&in, np.Namespace, "saddr", r.From, r.Ports, pod)
					}
				} else {
					isoEg = true
					for _, r := range np.Spec.Egress {
						s.allow(&eg, np.Namespace, "daddr", r.To, r.Ports, nil)
					}
				}
			}
		}
		id := strings.ReplaceAll(pod.Status.PodIP, ".", "_")
		if isoIn {
			fmt.Fprintf(&chains, " chain in_%s {\n%s  counter drop\n }\n", id, in.String())
			fmt.Fprintf(&fwd, "  ip daddr %s jump in_%s\n", pod.Status.PodIP, id)
		}
		if isoEg {
			fmt.Fprintf(&chains, " chain eg_%s {\n%s  counter drop\n }\n", id, eg.String())
			fmt.Fprintf(&fwd, "  ip saddr %s jump eg_%s\n", pod.Status.PodIP, id)
			fmt.Fprintf(&inp, "  ip saddr %s jump eg_%s\n", pod.Status.PodIP, id)
		}
	}
	return "table inet netpold\ndelete table inet netpold\ntable inet netpold {\n" + chains.String() +
		" chain forward {\n  type filter hook forward priority -10; policy accept;\n  ct state established,related accept\n" + fwd.String() + " }\n" +
		" chain input {\n  type filter hook input priority -10; policy accept;\n  ct state established,related accept\n" + inp.String() + " }\n}\n"
}

func main() {
	kc := flag.String("kubeconfig", "", "how to reach the API server")
	node := flag.String("node", "", "this node's name")
	nft := flag.String("nft", "nft", "the program nft")
	flag.Parse()
	cfg, err := clientcmd.BuildConfigFromFlags("", *kc)
	if err != nil {
		log.Fatal(err)
	}
	cs := kubernetes.NewForConfigOrDie(cfg)
	f := informers.NewSharedInformerFactory(cs, 0)
	kick := make(chan struct{}, 1)
	h := func() {
		select {
		case kick <- struct{}{}:
		default:
		}
	}
	hs := cache.ResourceEventHandlerFuncs{AddFunc: func(any) { h() }, UpdateFunc: func(any, any) { h() }, DeleteFunc: func(any) { h() }}
	pods, nss, nps := f.Core().V1().Pods(), f.Core().V1().Namespaces(), f.Networking().V1().NetworkPolicies()
	for _, i := range []cache.SharedIndexInformer{pods.Informer(), nss.Informer(), nps.Informer()} {
		if _, err := i.AddEventHandler(hs); err != nil {
			log.Fatal(err)
		}
	}
	ctx := context.Background()
	f.Start(ctx.Done())
	f.WaitForCacheSync(ctx.Done())
	last := ""
	for range kick {
		s := &state{ns: map[string]*corev1.Namespace{}}
		pl, _ := pods.Lister().List(labels.Everything())
		for _, p := range pl {
			if live(p) {
				s.pods = append(s.pods, p)
			}
		}
		nl, _ := nss.Lister().List(labels.Everything())
		for _, n := range nl {
			s.ns[n.Name] = n
		}
		s.nps, _ = nps.Lister().List(labels.Everything())
		rs := s.ruleset(*node)
		if rs == last {
			continue
		}
		t := time.Now()
		c := exec.Command(*nft, "-f", "-")
		c.Stdin = strings.NewReader(rs)
		if out, err := c.CombinedOutput(); err != nil {
			log.Printf("nft: %v: %s\n%s", err, out, rs)
			time.Sleep(time.Second)
			h()
			continue
		}
		last = rs
		log.Printf("programmed %d bytes, %d policies, %d pods in %s", len(rs), len(s.nps), len(s.pods), time.Since(t).Round(time.Millisecond))
	}
}
